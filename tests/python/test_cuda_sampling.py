"""Penalties and log-probabilities on a GPU: ops beside the CPU's, and whole generations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import SMALL_CACHE, has_cuda
from nanoflow import LLM, CompletionOutput, SamplingParams, _core
from random_models import SHAPES, write_config
from test_logprobs import logprobs
from test_penalties import penalize, random_case

pytestmark = pytest.mark.skipif(not has_cuda(), reason="no GPU that nanoflow can use")

Rng = np.random.Generator
SIZES: dict[str, Any] = {
    "device": "cuda",
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "max_model_len": 192,
    "kv_cache_memory_bytes": SMALL_CACHE,
}
TIGHT = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 6}


@pytest.mark.parametrize(
    "vocabulary", [pytest.param(130, marks=pytest.mark.sanitizer), 128_256, 151_937]
)
def test_penalties_have_the_bits_of_the_cpu(rng: Rng, vocabulary: int) -> None:
    rows = 70
    case = random_case(rng, rows, vocabulary, rng.integers(0, 3000, rows).tolist())
    on_gpu, on_cpu = (penalize(_core.Backend(device), **case) for device in ("cuda", "cpu"))
    np.testing.assert_array_equal(on_gpu, on_cpu)


@pytest.mark.parametrize("vocabulary", [128_256, 151_937, 262_145])
def test_logprobs_are_those_of_the_cpu(rng: Rng, vocabulary: int) -> None:
    logits = 4 * rng.standard_normal((300, vocabulary), np.float32)
    sampled, counts = rng.integers(0, vocabulary, 300), rng.integers(0, 21, 300)
    gpu, cpu = (
        logprobs(_core.Backend(device), logits, sampled, counts) for device in ("cuda", "cpu")
    )
    np.testing.assert_array_equal(gpu.top, cpu.top)
    np.testing.assert_array_equal(gpu.ranks, cpu.ranks)
    np.testing.assert_allclose(gpu.logprobs, cpu.logprobs, rtol=1e-6, atol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("llama"), **SHAPES["llama3-d64"])


@pytest.fixture(scope="module", params=[{}, TIGHT], ids=["roomy", "tight"])
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    with LLM(model, **SIZES | request.param) as llm:
        yield llm


def generate(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams]
) -> list[CompletionOutput]:
    return [output.outputs[0] for output in llm.generate([*prompts], params, use_tqdm=False)]


def prompts_of(count: int) -> list[list[int]]:
    """Of 3 to 90 tokens; all begin alike, so that some find their first pages in the cache."""
    lengths = np.random.default_rng(1).integers(3, 90, count)
    return [[5, 6, 7, *(np.arange(n) % 9)][:n] for n in lengths.tolist()]


def test_greedy_tokens_are_the_best_after_penalties(llm: LLM, blind: None) -> None:
    """Presence and frequency shift logits, hence logprobs, by what can be counted here."""
    prompts = prompts_of(12)
    values = [(n % 3 - 1.0, n % 4 * 0.6) for n in range(len(prompts))]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=40,
            ignore_eos=True,
            logprobs=20,
            presence_penalty=presence,
            frequency_penalty=frequency,
        )
        for presence, frequency in values
    ]
    for completion, (presence, frequency) in zip(
        generate(llm, prompts, params), values, strict=True
    ):
        assert completion.logprobs is not None and len(completion.token_ids) == 40
        seen: Counter[int] = Counter()
        for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
            score = {
                other: entry.logprob - seen[other] * frequency - (seen[other] > 0) * presence
                for other, entry in entries.items()
            }
            assert score[token] >= max(score.values()) - 1e-4
            seen[token] += 1
        if frequency > 0:
            assert max(seen.values()) < 40


def test_no_token_comes_twice_under_a_strong_penalty(llm: LLM, blind: None) -> None:
    prompts = prompts_of(12)
    params = [
        SamplingParams(
            seed=n,
            max_tokens=40,
            ignore_eos=True,
            presence_penalty=2,
            repetition_penalty=1e6,
            temperature=1e-4,
        )
        for n in range(12)
    ]
    for prompt, completion in zip(prompts, generate(llm, prompts, params), strict=True):
        assert len(set(completion.token_ids)) == 40
        assert not set(completion.token_ids) & set(prompt)


def test_what_some_ask_changes_nothing_for_others(llm: LLM) -> None:
    prompts = prompts_of(8)
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    asking = SamplingParams(
        temperature=0, max_tokens=20, ignore_eos=True, logprobs=3, frequency_penalty=1.0
    )
    alone = generate(llm, prompts, [plain] * 8)
    mixed = generate(llm, prompts, [asking if n % 2 else plain for n in range(8)])
    for n in range(0, 8, 2):
        assert mixed[n].logprobs is None and alone[n].token_ids == mixed[n].token_ids
    assert all(len(mixed[n].logprobs or ()) == 20 for n in range(1, 8, 2))
