"""What a whole LLM says of its tokens, beside a prefill of them: preemption, shared pages and
overlapped steps leave every key and value where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import DEVICES
from engine_driver import Chunk, EngineDriver, load_engine
from nanoflow import LLM, RequestOutput, SamplingParams, _core
from nanoflow.schedule import built_in_schedule
from nanoflow.scheduler.state import SchedulerState
from nanoflow.scheduler.step import Step
from tiny_models import write_tiny_llama
from tried_schedules import try_schedules

REQUESTS = 20
# Largest and mean distance of log-probabilities. On a GPU each way has its own order of sums.
LIMITS = {"cpu": (1e-5, 1e-6), "cuda": (0.2, 0.03)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(
        tmp_path_factory.mktemp("llama"),
        num_layers=3,
        hidden_size=256,
        intermediate_size=384,
        initializer_range=0.08,
    )


def generate(model: Path, device: str) -> list[RequestOutput]:
    """1,000 tokens drawn at temperature 1, on a cache that holds a third of what is wanted."""
    rng = np.random.default_rng(4)
    shared = rng.integers(0, 160, 40).tolist()
    prompts = [
        {"prompt_token_ids": shared * (n % 2) + rng.integers(0, 160, 1 + 5 * n % 37).tolist()}
        for n in range(REQUESTS)
    ]
    params = [
        SamplingParams(seed=n, max_tokens=50, ignore_eos=True, logprobs=1, detokenize=False)
        for n in range(REQUESTS)
    ]
    with LLM(
        model,
        device=device,
        dtype="bfloat16",
        schedule="overlap",
        cpu_threads=2 if device == "cpu" else 0,
        skip_tokenizer_init=True,
        block_size=16,
        num_gpu_blocks_override=20,
        max_model_len=144,
        max_num_seqs=12,
        max_num_batched_tokens=64,
    ) as llm:
        return llm.generate(prompts, params, use_tqdm=False)


def distances(model: Path, device: str, outputs: list[RequestOutput]) -> list[NDArray[np.float64]]:
    """Of the log-probability of every generated token, between the LLM's and a prefill's."""
    width = _core.Backend(device, threads=2 if device == "cpu" else 0).width
    schedule = built_in_schedule("sequential", width)
    engine = load_engine(
        model, schedule, dtype="bfloat16", device=device, threads=2, max_model_len=256
    )
    driver = EngineDriver(engine)
    found = []
    for output in outputs:
        completion = output.outputs[0]
        assert output.prompt_token_ids is not None and completion.logprobs is not None
        generated = list(completion.token_ids)
        said = [at[token].logprob for at, token in zip(completion.logprobs, generated, strict=True)]
        sequence = driver.add([*output.prompt_token_ids, *generated])
        chunk = Chunk(sequence, len(sequence.tokens), all_logits=True)
        logits = driver.step([[chunk]]).logits
        assert logits is not None
        driver.release(sequence)
        rows = logits[-len(generated) - 1 : -1].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        exact = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        found.append(np.abs(exact[np.arange(len(generated)), generated] - said))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes_schedules", [False, True])
def test_an_llm_says_what_a_prefill_says(
    model: Path,
    device: str,
    changes_schedules: bool,
    blind: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = try_schedules(monkeypatch) if changes_schedules else []
    outputs = generate(model, device)
    assert len(set(tried)) == (3 if changes_schedules else 0)
    assert sum(output.num_cached_tokens or 0 for output in outputs) > 0
    all_distances = np.concatenate(distances(model, device, outputs))
    largest, mean = LIMITS[device]
    assert len(all_distances) >= 1000
    assert all_distances.max() < largest and all_distances.mean() < mean


@pytest.mark.parametrize("device", DEVICES)
def test_pages_that_change_places_are_noticed(
    model: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above fails when two running requests get each other's third page, for good."""
    start_step = SchedulerState.start_step
    swapped: list[tuple[int, int]] = []

    def swapping(state: SchedulerState) -> Step:
        slots = state.slots
        full = [slot for slot in slots.running.tolist() if slots.computed[slot] >= 48]
        if not swapped and len(full) >= 2:
            first, second = full[:2]
            swapped.append((first, second))
            pages = slots.pages
            pages[[first, second], 2] = pages[[second, first], 2]
        return start_step(state)

    monkeypatch.setattr(SchedulerState, "start_step", swapping)
    outputs = generate(model, device)
    assert len(swapped) == 1
    largest, _ = LIMITS[device]
    spoilt = [d.max() > 2 * largest for d in distances(model, device, outputs)]
    assert 2 <= sum(spoilt) <= REQUESTS // 2
