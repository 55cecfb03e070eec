"""Penalties: the ops that keep histories and apply them, and whole generations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import reference
from nanoflow import LLM, SamplingParams, _core

Rng = np.random.Generator
UNTOUCHED = -7


def record(backend: _core.Backend, slots: list[int]) -> NDArray[np.int32]:
    """The history [4, 10] after five rows have sampled."""
    history = np.full((4, 10), UNTOUCHED, np.int32)
    _core.run_op(
        "record_samples",
        backend,
        sampled=np.array([11, 12, reference.INVALID_LOGITS, 14, 15], np.int32),
        slots=np.array(slots, np.int32),
        length=np.array([3, 0, 9, 10, 0], np.int32),
        history=history,
    )
    return history


def test_samples_are_appended_to_the_histories_of_rows_that_keep_one(
    backend: _core.Backend,
) -> None:
    """Not for rows of length 0, nor where the history is full; what is invalid counts as 0."""
    expected = np.full((4, 10), UNTOUCHED)
    expected[2, 3], expected[1, 9] = 11, 0
    np.testing.assert_array_equal(record(backend, [2, 3, 1, 0, -1]), expected)


def test_a_history_that_is_not_there_is_refused() -> None:
    with pytest.raises(_core.EngineError, match="row 0 has history 4, but there is"):
        record(_core.Backend("cpu", threads=1), [4, 3, 1, 0, -1])


def penalize(
    backend: _core.Backend,
    logits: NDArray[np.float32],
    histories: Sequence[Sequence[int]],
    generated: Sequence[int],
    *,
    presence: NDArray[np.float32],
    frequency: NDArray[np.float32],
    repetition: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Row i has histories[i], kept in another slot than i; the rest of `history` is nonsense."""
    rows = len(logits)
    slots = ((np.arange(rows) * 3 + 1) % (rows + 5)).astype(np.int32)
    slots = np.argsort(np.argsort(slots, kind="stable")).astype(np.int32)
    history = np.full((rows, max(1, *map(len, histories)) + 3), 10**9, np.int32)
    for slot, tokens in zip(slots, histories, strict=True):
        history[slot, : len(tokens)] = tokens
    after = logits.copy()
    _core.run_op(
        "penalize",
        backend,
        logits=after,
        history=history,
        slots=slots,
        length=np.array([len(tokens) for tokens in histories], np.int32),
        generated=np.array(generated, np.int32),
        presence=presence,
        frequency=frequency,
        repetition=repetition,
    )
    return after


def random_case(rng: Rng, rows: int, vocabulary: int, lengths: Sequence[int]) -> dict[str, Any]:
    """Few distinct tokens for some rows, so that they occur often and on both sides."""
    histories = [
        rng.integers(0, vocabulary if row % 2 else min(vocabulary, 20), lengths[row]).tolist()
        for row in range(rows)
    ]
    return {
        "logits": (3 * rng.standard_normal((rows, vocabulary))).astype(np.float32),
        "histories": histories,
        "generated": [int(rng.integers(0, len(tokens) + 1)) for tokens in histories],
        "presence": rng.uniform(-2, 2, rows).astype(np.float32),
        "frequency": rng.uniform(-2, 2, rows).astype(np.float32),
        "repetition": rng.uniform(0.5, 2, rows).astype(np.float32),
    }


@pytest.mark.parametrize("vocabulary", [1, 63, 12_289, 49_152])
def test_penalties_are_applied_once_for_each_token(
    backend: _core.Backend, rng: Rng, vocabulary: int
) -> None:
    lengths = [0, 1, 2, 3, 50, 700, 4000]
    case = random_case(rng, len(lengths), vocabulary, lengths)
    after = penalize(backend, **case)
    for row in range(len(lengths)):
        expected = reference.penalize(
            case["logits"][row],
            case["histories"][row],
            case["generated"][row],
            **{name: float(case[name][row]) for name in ("presence", "frequency", "repetition")},
        )
        np.testing.assert_allclose(after[row], expected, rtol=2e-6, atol=2e-6)
        unseen = np.setdiff1d(np.arange(vocabulary), case["histories"][row])
        np.testing.assert_array_equal(after[row, unseen], case["logits"][row, unseen])


def test_neutral_penalties_and_banned_tokens(backend: _core.Backend, rng: Rng) -> None:
    case = random_case(rng, 3, 100, [9, 9, 9])
    case["logits"][:, case["histories"][1]] = -np.inf
    case["presence"][:] = case["frequency"][:] = 0
    case["repetition"][:] = 1
    np.testing.assert_array_equal(penalize(backend, **case), case["logits"])


@pytest.mark.parametrize(
    ("histories", "generated", "message"),
    [
        ([[3, 100]], [1], "row 0 has token 100 at position 1 but the vocabulary has 100"),
        ([[3, -1]], [1], "token -1"),
        ([[3, 4]], [3], "row 0 has 2 tokens, 3 of them generated"),
    ],
)
def test_a_history_that_cannot_be_is_refused(
    histories: list[list[int]], generated: list[int], message: str
) -> None:
    one = np.ones(1, np.float32)
    logits = np.zeros((1, 100), np.float32)
    with pytest.raises(_core.EngineError, match=message):
        penalize(
            _core.Backend("cpu", threads=1),
            logits,
            histories,
            generated,
            presence=one,
            frequency=one,
            repetition=one,
        )


SIZES: dict[str, Any] = {"max_model_len": 64, "block_size": 8, "dtype": "float32"}
PENALTIES = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.5, "presence_penalty": 2.0, "repetition_penalty": 1.2},
    {},
]
PROMPTS = [[5, 6, 5, 7] * 5, [9] * 3, [40, 41, 42], [100], list(range(20, 50)), [5, 6, 5, 7]]


def greedy(penalties: dict[str, float]) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, **penalties)  # type: ignore[arg-type]


def generate(llm: LLM, requests: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    prompts, params = zip(*requests, strict=True)
    outputs = llm.generate([*prompts], [*params], use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """Of each prompt with its penalties: transformers' logits, penalized by the reference."""
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = []
    for prompt, penalties in zip(PROMPTS, PENALTIES, strict=True):
        tokens = list(prompt)
        short = {name.removesuffix("_penalty"): value for name, value in penalties.items()}
        for generated in range(25):
            with torch.no_grad():
                logits = oracle(torch.tensor([tokens])).logits[0, -1].numpy()
            tokens.append(int(reference.penalize(logits, tokens, generated, **short).argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


def test_penalties_change_generations_as_they_should(
    model: Path, expected: list[list[int]]
) -> None:
    requests = [(p, greedy(x)) for p, x in zip(PROMPTS, PENALTIES, strict=True)]
    with LLM(model, **SIZES) as llm:
        assert generate(llm, requests) == expected
        assert generate(llm, requests[:1]) == expected[:1]
        plain = generate(llm, [(prompt, greedy({})) for prompt in PROMPTS])
        assert [a == b for a, b in zip(plain, expected, strict=True)] == [False] * 5 + [True]


@pytest.mark.parametrize("schedule", ["nano", "overlap"])
def test_no_schedule_chunk_or_preemption_changes_them(
    schedule: str, model: Path, expected: list[list[int]], blind: None
) -> None:
    sizes = SIZES | {"max_num_seqs": 5, "max_num_batched_tokens": 7, "num_gpu_blocks_override": 12}
    requests = [(p, greedy(x)) for p, x in zip(PROMPTS, PENALTIES, strict=True)] * 3
    with LLM(model, schedule=schedule, **sizes) as llm:
        prompts, params = zip(*requests, strict=True)
        outputs = llm.generate([*prompts], [*params], use_tqdm=False)
        assert sum(output.metrics.num_preemptions for output in outputs if output.metrics) > 0
        assert [output.outputs[0].token_ids for output in outputs] == expected * 3


def test_random_draws_see_penalties_too(model: Path) -> None:
    """A token that a strong penalty has used up is not drawn again."""
    params = SamplingParams(
        seed=1, max_tokens=30, ignore_eos=True, presence_penalty=2, repetition_penalty=1e6
    )
    with LLM(model, **SIZES) as llm:
        [tokens] = generate(llm, [([5, 6, 7], params)])
        assert len(set(tokens) | {5, 6, 7}) >= 32


def test_a_shared_prefix_counts_too(model: Path) -> None:
    """Tokens whose keys another request has left are computed by nobody, but were seen."""
    prompt = [7, 8, 9, 10] * 8
    params = greedy({"repetition_penalty": 1.5})
    with LLM(model, enable_prefix_caching=False, **SIZES) as llm:
        [alone] = generate(llm, [(prompt, params)])
        assert alone != generate(llm, [(prompt, greedy({}))])[0]
    with LLM(model, enable_prefix_caching=True, **SIZES) as llm:
        generate(llm, [(prompt, greedy({}))])
        [output] = llm.generate([prompt], params, use_tqdm=False)
        assert output.num_cached_tokens > 0
        assert output.outputs[0].token_ids == alone
