"""prompt_logprobs: how likely the tokens of prompts are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from conftest import DEVICES, SMALL_CACHE
from nanoflow import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from random_models import SHAPES, write_config

SIZES: dict[str, Any] = {"max_model_len": 200, "block_size": 8, "dtype": "float32", "device": "cpu"}
LENGTHS = (1, 2, 9, 64, 150)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **SIZES) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 150, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]]) -> list[NDArray[np.float64]]:
    """[tokens - 1, V] of each prompt: log-probabilities of what follows each token."""
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = [oracle(torch.tensor([prompt])).logits[0, :-1] for prompt in prompts]
    return [torch.log_softmax(one.double(), -1).numpy() for one in logits]


def check(
    output: RequestOutput, prompt: list[int], expected: NDArray[np.float64], count: int
) -> None:
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for token, entries, row in zip(prompt[1:], output.prompt_logprobs[1:], expected, strict=True):
        assert entries is not None and next(iter(entries)) == token
        assert set(entries) == {token, *np.argsort(-row, kind="stable")[:count].tolist()}
        for other, entry in entries.items():
            assert entry.logprob == pytest.approx(row[other], abs=2e-4)
            assert entry.rank == (row >= row[other]).sum()


@pytest.mark.parametrize("schedule", ["sequential", "overlap"])
@pytest.mark.parametrize("sizes", [{}, {"max_num_seqs": 2, "max_num_batched_tokens": 70}])
def test_they_are_those_of_transformers(
    model: Path,
    prompts: list[list[int]],
    expected: list[NDArray[np.float64]],
    sizes: dict[str, int],
    schedule: str,
) -> None:
    """In one chunk and in many; other options of the request and other requests do no harm."""
    counts = [0, 1, 5, 20, 3]
    params = [
        SamplingParams(
            temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=count, **options
        )
        for count, options in zip(
            counts,
            [{}, {"logprobs": 2}, {"repetition_penalty": 1.5}, {"logit_bias": {5: 9.0}}, {}],
            strict=True,
        )
    ]
    plain = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    both = [*params, *[plain] * len(params)]
    with LLM(model, schedule=schedule, **(SIZES | sizes)) as llm:
        outputs = llm.generate([*prompts, *prompts], both, use_tqdm=False)
    for output, prompt, rows, count in zip(outputs, prompts, expected, counts, strict=False):
        check(output, prompt, rows, count)
    for scored, other in zip(outputs[:2], outputs[5:7], strict=True):
        assert scored.outputs[0].token_ids == other.outputs[0].token_ids
        assert other.prompt_logprobs is None
    assert outputs[1].outputs[0].logprobs is not None and outputs[0].outputs[0].logprobs is None


def test_the_cache_is_not_asked(
    llm: LLM, prompts: list[list[int]], expected: list[NDArray[np.float64]]
) -> None:
    """Its pages hold no logits; but what such a request computes, others find."""
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    llm.reset_prefix_cache()
    first, again = (llm.generate([prompts[4]], params, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 144)
    params.prompt_logprobs = 2
    [scored] = llm.generate([prompts[4]], params, use_tqdm=False)
    assert scored.num_cached_tokens == 0
    check(scored, prompts[4], expected[4], 2)
    llm.reset_prefix_cache()
    params.n = 3
    [scored] = llm.generate([prompts[4]], params, use_tqdm=False)
    check(scored, prompts[4], expected[4], 2)
    assert len({tuple(sample.token_ids) for sample in scored.outputs}) > 1


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_streams_tell_them(
    model: Path, prompts: list[list[int]], expected: list[NDArray[np.float64]], kind: Any
) -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True, prompt_logprobs=1, output_kind=kind)

    async def collect() -> list[RequestOutput]:
        engine = AsyncLLM(model, **SIZES)
        try:
            return [output async for output in engine.generate(prompts[3], params, "one")]
        finally:
            engine.shutdown()

    outputs = asyncio.run(collect())
    told = outputs[:1] if kind is RequestOutputKind.DELTA else outputs
    for output in told:
        check(output, prompts[3], expected[3], 1)
    assert all(output.prompt_logprobs is None for output in outputs[len(told) :])


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_generated_is_scored_as_it_was_sampled(tmp_path: Path, device: str) -> None:
    """In half precision, in chunks: a log-probability is that of its row, however a token came."""
    model = write_config(tmp_path, **SHAPES["llama3-d64"])
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 150, length).tolist() for length in (1, 30, 70)]
    sizes = {"max_num_batched_tokens": 48, "max_num_seqs": 5, "max_model_len": 192}
    with LLM(
        model,
        device=device,
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=SMALL_CACHE,
        **sizes,
    ) as llm:
        params = SamplingParams(seed=1, max_tokens=60, ignore_eos=True, logprobs=2)
        first = llm.generate([*prompts], params, use_tqdm=False)
        whole = [p + o.outputs[0].token_ids for p, o in zip(prompts, first, strict=True)]
        params = SamplingParams(max_tokens=1, prompt_logprobs=2)
        again = llm.generate([*whole], params, use_tqdm=False)
    for output, scored in zip(first, again, strict=True):
        sampled, told = output.outputs[0], (scored.prompt_logprobs or [])[-60:]
        for token, one, other in zip(sampled.token_ids, sampled.logprobs or [], told, strict=True):
            assert other is not None
            assert other[token].logprob == pytest.approx(one[token].logprob, abs=0.1)
