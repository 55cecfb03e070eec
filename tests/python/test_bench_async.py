"""`bench throughput` through AsyncLLM and LLM, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoflow.bench.async_batch import AsyncBatch
from nanoflow.bench.datasets import Request
from nanoflow.bench.throughput import measure, sampling_params
from nanoflow.errors import EngineError
from nanoflow.llm import LLM
from nanoflow.scheduler.stats import StepStats
from test_bench import bench

REQUESTS = [Request([20 + index, *range(30, 33 + index)], 3 + index % 4) for index in range(9)]
PROMPTS = [{"prompt_token_ids": request.prompt_token_ids} for request in REQUESTS]
PARAMS = sampling_params(REQUESTS, temperature=1.0, detokenize=True, seed=3, n=2)


def make_arguments(model: Path) -> dict[str, object]:
    return {"model": str(model), "device": "cpu", "max_num_seqs": 4}


def test_both_fronts_generate_the_same(model):
    with AsyncBatch(**make_arguments(model)) as batch:
        found = batch.generate(PROMPTS, PARAMS, use_tqdm=False)
    with LLM(**make_arguments(model)) as llm:
        expected = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert all(output.finished for output in found)
    assert [output.outputs for output in found] == [output.outputs for output in expected]
    assert len({tuple(output.outputs[0].token_ids) for output in found}) > 1


def test_a_batch_is_measured_and_ends_with_its_engine(model):
    how = {"temperature": 1.0, "detokenize": False, "seed": 3, "use_tqdm": False}
    with AsyncBatch(**make_arguments(model)) as batch:
        run = measure(batch, REQUESTS, **how)
        assert batch.step_listener is None
        assert batch.reset_prefix_cache()
        assert measure(batch, REQUESTS, **how).output_tokens == run.output_tokens
        with pytest.raises(ValueError, match="order='auto', but AsyncLLM takes requests as they"):
            batch.generate(PROMPTS, PARAMS, use_tqdm=False, order="auto")
        with pytest.raises(ValueError, match="300"):
            measure(batch, [*REQUESTS, Request([7] * 300, 5)], **how)
    assert run.output_tokens == sum(request.output_len for request in REQUESTS)
    assert run.steps > max(request.output_len for request in REQUESTS)
    with pytest.raises(EngineError, match="closed"):
        batch.generate(PROMPTS, PARAMS, use_tqdm=False)


LOAD = ("--input-len", "7", "--output-len", "5", "--num-prompts", "10", "--max-num-seqs", "4")


@pytest.mark.parametrize(
    ("flags", "front", "is_prequeued"),
    [
        (("--async-engine", "--n", "2", "--num-warmups", "3"), "AsyncLLM", False),
        (("--prequeue-requests", "--n", "2"), "LLM", True),
        (("--n", "2"), "LLM", True),
    ],
)
def test_the_result_says_which_front_was_used(model, tmp_path, flags, front, is_prequeued):
    path = tmp_path / "result.json"
    assert bench("throughput", "--model", model, *LOAD, *flags, "--output-json", path) == 0
    found = json.loads(path.read_text())
    assert (found["front"], found["prequeue_requests"]) == (front, is_prequeued)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (70, 100)
    assert found["num_steps"] >= 5 * 20 / 4
    assert found["limits"]["max_num_seqs"] == 4


def test_an_llm_queues_all_requests_before_the_first_step(model):
    steps: list[StepStats] = []
    with LLM(**make_arguments(model)) as llm:
        llm.step_listener = steps.append
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert steps[0].running + steps[0].waiting == 2 * len(REQUESTS)


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (("--prequeue-requests",), "--prequeue-requests"),
        (("--order", "auto", "--steady-start"), "--order auto, --steady-start"),
        (("--ablate",), "--ablate"),
        (("--compare", "nano", "overlap"), "--compare"),
    ],
)
def test_flags_that_take_an_llm_are_told(model, capsys, flags, refused):
    assert bench("throughput", "--model", model, *LOAD, "--async-engine", *flags) == 1
    assert f"--async-engine has no {refused}: that takes an LLM" in capsys.readouterr().err
