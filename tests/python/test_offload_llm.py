"""A whole LLM with tiers below its KV cache says what one without them says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import DEVICES
from nanoflow import LLM, RequestOutput, SamplingParams
from nanoflow.offload.cost import CostModel
from tiny_models import write_tiny_llama

SIZES: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "block_size": 16,
    "max_model_len": 144,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 20,
}
HOST_GIB = 0.05


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(
        tmp_path_factory.mktemp("llama"),
        num_layers=3,
        hidden_size=256,
        intermediate_size=384,
        initializer_range=0.08,
    )


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model computes faster than it copies, which is not the subject here."""
    monkeypatch.setattr(CostModel, "is_worth", lambda *arguments: True)


def make_llm(model: Path, device: str, **arguments: Any) -> LLM:
    threads = {"cpu_threads": 2} if device == "cpu" else {}
    return LLM(model, device=device, **{**SIZES, **threads, **arguments})


def values(llm: LLM) -> dict[str, float]:
    """Of the metrics that have one, with the values of their own labels appended."""
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        labels = [v for k, v in metric.labels.items() if k not in ("model_name", "engine")]
        if hasattr(metric, "value"):
            found[":".join([metric.name.removeprefix("nanoflow:"), *labels])] = metric.value
    return found


def prompts(count: int, seed: int = 4) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        {"prompt_token_ids": rng.integers(0, 160, 1 + 5 * n % 37).tolist()} for n in range(count)
    ]


def sampling(count: int) -> list[SamplingParams]:
    return [
        SamplingParams(seed=n, max_tokens=50, ignore_eos=True, logprobs=1, detokenize=False)
        for n in range(count)
    ]


def said(outputs: list[RequestOutput]) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities."""
    found = []
    for output in outputs:
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        assert completion.logprobs is not None
        logprobs = [at[t].logprob for at, t in zip(completion.logprobs, tokens, strict=True)]
        found.append((tokens, logprobs))
    return found


@pytest.mark.parametrize("schedule", ["sequential", "overlap"])
@pytest.mark.parametrize("device", DEVICES)
def test_preempted_requests_say_the_same_when_swapped(
    model: Path, device: str, schedule: str, blind: None, eager: None
) -> None:
    """On a GPU rounding may differ where other requests share a step: tokens nearly agree."""
    answers = []
    for size in (None, HOST_GIB):
        with make_llm(model, device, schedule=schedule, kv_offloading_size=size) as llm:
            outputs = llm.generate(prompts(20), sampling(20), use_tqdm=False)
            answers.append(said(outputs))
            metrics = values(llm)
            assert metrics["num_preemptions"] > 5
    assert metrics["kv_offload_resumed_tokens"] > 200
    assert metrics["kv_offload_total_bytes:CPU_to_GPU"] > 0
    assert metrics["kv_offload_total_time:GPU_to_CPU"] > 0
    if device == "cpu":
        assert answers[0] == answers[1]
    else:
        same = [a == b for (one, _), (other, _) in zip(*answers, strict=True)
                for a, b in zip(one, other, strict=True)]  # fmt: skip
        assert np.mean(same) > 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_round_computes_what_is_new(model: Path, device: str, eager: None) -> None:
    rng = np.random.default_rng(1)
    first = rng.integers(0, 160, 70).tolist()
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    rounds = {}
    for size in (None, HOST_GIB):
        with make_llm(model, device, kv_offloading_size=size) as llm:
            one = llm.generate({"prompt_token_ids": first}, greedy, use_tqdm=False)[0]
            llm.generate(prompts(40, seed=5), sampling(40), use_tqdm=False)  # takes every page
            history = [*first, *one.outputs[0].token_ids, *first[:9]]
            two = llm.generate({"prompt_token_ids": history}, greedy, use_tqdm=False)[0]
            rounds[size] = two
            metrics = values(llm)
    assert rounds[None].num_cached_tokens == 0
    assert rounds[HOST_GIB].num_cached_tokens == 80  # five full pages of 70 + 20 tokens
    assert metrics["kv_offload_hits:host"] == metrics["external_prefix_cache_hits"] == 80
    if device == "cpu":
        assert rounds[HOST_GIB].outputs[0].token_ids == rounds[None].outputs[0].token_ids


@pytest.mark.parametrize("device", DEVICES)
def test_a_restart_finds_the_ssd_as_it_was_left(
    model: Path, device: str, tmp_path: Path, eager: None
) -> None:
    tokens = np.random.default_rng(1).integers(0, 160, 100).tolist()
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    tiers = {"kv_offloading_size": HOST_GIB, "kv_offloading_ssd": f"{tmp_path}:50M"}
    answers = []
    for _ in range(2):
        with make_llm(model, device, **tiers) as llm:
            with pytest.raises(ValueError, match="in use by another engine"):
                make_llm(model, device, **tiers)
            answers.append(llm.generate({"prompt_token_ids": tokens}, greedy, use_tqdm=False)[0])
            metrics = values(llm)
    assert [answer.num_cached_tokens for answer in answers] == [0, 96]
    assert metrics["kv_offload_hits:ssd"] == 96 and metrics["kv_offload_hits:host"] == 0
    assert metrics["kv_offload_total_bytes:SSD_to_CPU"] > 0
    if device == "cpu":
        assert answers[0].outputs[0].token_ids == answers[1].outputs[0].token_ids


def test_nothing_is_left_when_all_is_done(model: Path, blind: None, eager: None) -> None:
    with make_llm(model, "cpu", kv_offloading_size=HOST_GIB) as llm:
        llm.generate(prompts(20), sampling(20), use_tqdm=False)
        llm.reset_prefix_cache()
        llm.generate(prompts(1), sampling(1), use_tqdm=False)
    state = llm._runtime.state
    state.reclaim(state.arrived_step)
    state.check_integrity()
    assert state.offload is not None
    state.offload.check_idle()
    assert state.pages.num_free == SIZES["num_gpu_blocks_override"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_offloading_size": 0}, "must be a number of GiB above 0"),
        ({"kv_offloading_size": 1e-6}, "hold no page of 16 tokens"),
        ({"kv_offloading_size": 1, "enable_prefix_caching": False}, "enable_prefix_caching"),
        ({"kv_offloading_backend": "lmcache"}, "supported: 'native'"),
        ({"kv_offloading_ssd": "/tmp/kv:1"}, "needs kv_offloading_size"),
        ({"kv_offloading_ssd": "/tmp/kv", "kv_offloading_size": 1}, "PATH:SIZE"),
    ],
)
def test_arguments_that_cannot_be(model: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_llm(model, "cpu", **arguments)
