"""Log-probabilities: the op, and what generate() returns of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import reference
from nanoflow import LLM, SamplingParams, _core
from nanoflow.outputs import CompletionOutput

Rng = np.random.Generator
POISON = 12345
MAX_TOP = 20


@dataclass(frozen=True)
class Found:
    top: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    ranks: NDArray[np.int32]


def logprobs(
    backend: _core.Backend,
    logits: NDArray[np.float32],
    sampled: NDArray[Any],
    counts: NDArray[Any],
    width: int = 0,
    targets: NDArray[Any] | None = None,
) -> Found:
    rows = len(logits)
    found = Found(
        top=np.full((rows, MAX_TOP), POISON, np.int32),
        logprobs=np.full((rows, 1 + MAX_TOP), POISON, np.float32),
        ranks=np.full(rows, POISON, np.int32),
    )
    _core.run_op(
        "logprobs",
        backend,
        width=width,
        logits=logits,
        sampled=sampled.astype(np.int32),
        targets=np.full(rows, -1, np.int32) if targets is None else targets.astype(np.int32),
        counts=counts.astype(np.int32),
        top=found.top,
        logprobs=found.logprobs,
        ranks=found.ranks,
    )
    return found


def check_row(found: Found, row: int, logits: NDArray[np.float32], token: int, count: int) -> None:
    expected = reference.log_softmax(logits)
    order = np.lexsort((np.arange(len(logits)), -logits))[:count]
    np.testing.assert_array_equal(found.top[row, : len(order)], order)
    assert (found.top[row, len(order) :] == -1).all()
    got = found.logprobs[row, : 1 + len(order)]
    np.testing.assert_allclose(got, expected[[token, *order]], rtol=1e-6, atol=1e-5)
    assert np.isneginf(found.logprobs[row, 1 + len(order) :]).all()
    assert found.ranks[row] == (logits >= logits[token]).sum()


@pytest.mark.parametrize("vocabulary", [1, 2, 19, 513, 4099, 49_152])
@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
def test_the_sampled_and_the_likeliest(
    backend: _core.Backend, rng: Rng, vocabulary: int, scale: float
) -> None:
    rows = 9
    logits = (scale * rng.standard_normal((rows, vocabulary))).astype(np.float32)
    counts = np.array([0, 1, 2, 5, 19, 20, -1, 20, 3])
    sampled = rng.integers(0, vocabulary, rows)
    sampled[7] = logits[7].argmax()
    found = logprobs(backend, logits, sampled, counts)
    for row in range(rows):
        if counts[row] >= 0:
            check_row(found, row, logits[row], sampled[row], counts[row])
    for array in (found.top, found.logprobs, found.ranks):
        assert (array[6] == POISON).all()


def test_ties_banned_tokens_and_one_column(backend: _core.Backend, rng: Rng) -> None:
    """Equal logits, minus infinities, and the highest all 512 tokens apart."""
    logits = rng.standard_normal((5, 20_000)).astype(np.float32)
    logits[0] = 2.5
    logits[1, 7:] = -np.inf
    logits[2, 3::512] += 100
    logits[3, ::2] = 9.0
    logits[4] = np.sort(logits[4])
    sampled = np.array([19_999, 3, 3 + 512 * 7, 1, 19_998])
    found = logprobs(backend, logits, sampled, np.full(5, 20))
    for row in range(5):
        check_row(found, row, logits[row], sampled[row], 20)


def test_a_row_can_tell_of_a_token_that_was_not_sampled(backend: _core.Backend, rng: Rng) -> None:
    logits = rng.standard_normal((4, 700)).astype(np.float32)
    targets = np.array([3, -1, 699, 0])
    found = logprobs(backend, logits, np.array([5, 6, -1, -1]), np.full(4, 7), targets=targets)
    for row, token in enumerate([3, 6, 699, 0]):
        check_row(found, row, logits[row], token, 7)


def test_rows_without_a_sample_say_nothing(backend: _core.Backend, rng: Rng) -> None:
    logits = rng.standard_normal((3, 700)).astype(np.float32)
    logits[1, 5] = np.nan
    found = logprobs(backend, logits, np.array([4, reference.INVALID_LOGITS, 6]), np.full(3, 2))
    assert (
        found.ranks[1] == 0 and (found.top[1] == -1).all() and np.isneginf(found.logprobs[1]).all()
    )
    for row, token in ((0, 4), (2, 6)):
        check_row(found, row, logits[row], token, 2)


def test_a_row_depends_on_nothing_else(backend: _core.Backend, rng: Rng) -> None:
    logits = rng.standard_normal((40, 3000)).astype(np.float32)
    sampled, counts = rng.integers(0, 3000, 40), rng.integers(-1, 21, 40)
    whole = logprobs(backend, logits, sampled, counts)
    for first, last, width in [(0, 40, 1), (7, 8, 2), (13, 33, 1)]:
        some = slice(first, last)
        part = logprobs(backend, logits[some], sampled[some], counts[some], width)
        for name in ("top", "logprobs", "ranks"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[some])


def test_more_than_there_is_room_for_is_refused() -> None:
    with pytest.raises(_core.EngineError, match="row 0 wants 21 tokens, above 20"):
        zero = np.zeros(1)
        logprobs(_core.Backend("cpu", threads=1), np.zeros((1, 9), np.float32), zero, zero + 21)


SIZES: dict[str, Any] = {"max_model_len": 64, "block_size": 8, "dtype": "float32"}


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **SIZES) as llm:
        yield llm


def generate(llm: LLM, prompts: list[list[int]], params: Any) -> list[CompletionOutput]:
    return [output.outputs[0] for output in llm.generate([*prompts], params, use_tqdm=False)]


def oracle(model: Path, prompt: list[int], tokens: list[int]) -> NDArray[np.float64]:
    """[tokens, V] log-probabilities before each of the tokens that follow a prompt."""
    reference_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = reference_model(torch.tensor([prompt + tokens])).logits[0]
    return torch.log_softmax(logits.double(), -1).numpy()[len(prompt) - 1 : -1]


def check(completion: CompletionOutput, expected: NDArray[np.float64], count: int) -> None:
    """The entries of each token: itself first, then the likeliest, with their ranks."""
    assert completion.logprobs is not None and completion.cumulative_logprob is not None
    assert len(completion.logprobs) == len(completion.token_ids)
    for token, entries, row in zip(
        completion.token_ids, completion.logprobs, expected, strict=True
    ):
        likeliest = np.argsort(-row, kind="stable")[:count].tolist()
        assert next(iter(entries)) == token
        assert set(entries) == {token, *likeliest}
        for other, entry in entries.items():
            assert entry.logprob == pytest.approx(row[other], abs=2e-4)
            assert entry.rank == (row >= row[other]).sum()
    own = [
        entries[token].logprob
        for token, entries in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    assert completion.cumulative_logprob == pytest.approx(sum(own))


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_they_are_those_of_transformers(
    model: Path, llm: LLM, count: int, temperature: float
) -> None:
    params = SamplingParams(
        temperature=temperature, seed=3, top_k=50, max_tokens=12, ignore_eos=True, logprobs=count
    )
    [completion] = generate(llm, [[5, 6, 7]], params)
    check(completion, oracle(model, [5, 6, 7], completion.token_ids), count)


def test_they_are_those_before_penalties_and_bans(model: Path, llm: LLM) -> None:
    eos = llm.get_tokenizer().eos_token_id
    assert eos is not None
    params = SamplingParams(
        temperature=0,
        max_tokens=12,
        min_tokens=12,
        logprobs=20,
        repetition_penalty=1.5,
        presence_penalty=1.0,
        stop_token_ids=list(range(40, 80)),
    )
    [completion] = generate(llm, [[5, 6, 7]], params)
    check(completion, oracle(model, [5, 6, 7], completion.token_ids), 20)
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    assert completion.token_ids != generate(llm, [[5, 6, 7]], plain)[0].token_ids


def test_only_who_asks_gets_them(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, logprobs=n) for n in (None, 0, None, 3)]
    outputs = generate(llm, [[5], [6], [7], [8]], params)
    assert [output.logprobs is None for output in outputs] == [True, False, True, False]
    assert [output.cumulative_logprob is None for output in outputs] == [True, False, True, False]
    assert {len(entries) for entries in outputs[1].logprobs or ()} == {1}
    assert {len(entries) for entries in outputs[3].logprobs or ()} == {3}


def test_tokens_are_told_as_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0, logprobs=2)
    [completion] = generate(llm, [[5, 6]], params)
    tokenizer = llm.get_tokenizer()
    for entries in completion.logprobs or ():
        for token, entry in entries.items():
            assert entry.decoded_token == tokenizer.decode([token], skip_special_tokens=False)
    params.detokenize = False
    [completion] = generate(llm, [[5, 6]], params)
    assert {e.decoded_token for entries in completion.logprobs or () for e in entries.values()} == {
        None
    }


def test_they_follow_the_tokens_to_every_end(llm: LLM) -> None:
    """Stop tokens, stop strings and the longest length; what is sampled behind them is dropped."""
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=1)
    [whole] = generate(llm, [[5, 6]], greedy)
    stop = next(t for t in whole.token_ids[3:] if t not in whole.token_ids[:3])
    text = llm.get_tokenizer().decode([stop])
    for changes in ({"stop_token_ids": [stop]}, {"stop": text}, {"max_tokens": 5}):
        params = SamplingParams(
            **{"temperature": 0, "max_tokens": 20, "ignore_eos": True, "logprobs": 1, **changes}
        )  # type: ignore[arg-type]
        [completion] = generate(llm, [[5, 6]], params)
        length = len(completion.token_ids)
        assert 0 < length < 20 and completion.token_ids == whole.token_ids[:length]
        assert completion.logprobs == (whole.logprobs or [])[:length]


@pytest.mark.parametrize("schedule", ["nano", "overlap"])
def test_no_schedule_or_preemption_changes_them(
    schedule: str, model: Path, llm: LLM, blind: None
) -> None:
    prompts = [[n, n + 1, n + 2] * (1 + n % 4) for n in range(5, 23)]
    params = [
        SamplingParams(
            seed=n,
            max_tokens=20,
            ignore_eos=True,
            logprobs=n % 4 if n % 3 else None,
            frequency_penalty=0.5 * (n % 2),
        )
        for n in range(len(prompts))
    ]
    expected = generate(llm, prompts, params)
    sizes = SIZES | {"max_num_seqs": 5, "max_num_batched_tokens": 7, "num_gpu_blocks_override": 10}
    with LLM(model, schedule=schedule, **sizes) as other:
        outputs = other.generate([*prompts], params, use_tqdm=False)
        assert [output.outputs[0] for output in outputs] == expected
        assert sum(output.metrics.num_preemptions for output in outputs if output.metrics) > 0
