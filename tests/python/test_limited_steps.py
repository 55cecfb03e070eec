"""Masks that wait for tokens, and prompts that are scored, in steps of any form."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fake_engine import FakeBatch, FakeEngine, FakeHandle, next_token, salt_of
from nanoflow.request import Request
from nanoflow.token_masks import BadWords
from test_policy import EOS, VOCAB_SIZE, Setup, request, setups

PER_SAMPLE = ("slots", "temperature", "top_p", "min_p", "top_k", "seed", "counter")
Pairs = list[tuple[int, ...]]


def score(position: int, token: int, target: int) -> float:
    """What the fake engine calls the log-probability of a target behind a token: no other's."""
    return float((position * VOCAB_SIZE + token) * VOCAB_SIZE + target)


@dataclass
class FakeLogprobs:
    top: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    ranks: NDArray[np.int32]


@dataclass
class ScoredResult:
    tokens: NDArray[np.int32]
    logprobs: FakeLogprobs | None


@dataclass
class ScoredHandle:
    inner: FakeHandle
    scores: list[float]

    @property
    def step(self) -> int:
        return self.inner.step

    def wait(self) -> ScoredResult:
        tokens = self.inner.wait().tokens
        if not self.scores:
            return ScoredResult(tokens, None)
        values = np.zeros((len(tokens) + len(self.scores), 21), np.float32)
        values[len(tokens) :, 0] = self.scores
        top = np.zeros((len(values), 20), np.int32)
        told = FakeLogprobs(top, values, np.ones(len(values), np.int32))
        return ScoredResult(np.append(tokens, np.full(len(self.scores), -1, np.int32)), told)


@dataclass
class ScoringEngine:
    """A fake engine that takes scored rows off its batches, and answers for them."""

    engine: FakeEngine

    @property
    def completed_steps(self) -> int:
        return self.engine.completed_steps

    def submit(self, batch: FakeBatch) -> ScoredHandle:
        arrays = dict(batch.arrays)
        targets = arrays.pop("targets", np.full(len(arrays["slots"]), -1, np.int32))
        sampled = int((targets < 0).sum())
        assert (targets[:sampled] < 0).all() and (arrays["slots"][sampled:] == -1).all()
        assert len(targets) <= self.engine.max_num_seqs + 64
        rows = arrays["sample_rows"][sampled:]
        scores = [
            score(*case)
            for case in zip(
                arrays["positions"][rows].tolist(),
                arrays["tokens"][rows].tolist(),
                targets[sampled:].tolist(),
                strict=True,
            )
        ]
        assert ("logprobs" in arrays) == bool(scores)
        arrays.pop("logprobs", None)
        for name in ("sample_rows", "mask_rows", *PER_SAMPLE):
            if name in arrays:
                arrays[name] = arrays[name][:sampled]
        arrays["banned_indptr"] = arrays["banned_indptr"][: sampled + 1]
        return ScoredHandle(self.engine.submit(FakeBatch(arrays)), scores)


def expected_tokens(item: Request, pairs: Pairs) -> list[int]:
    mask = BadWords(pairs, VOCAB_SIZE) if pairs else None
    history, output = item.prompt_token_ids.tolist(), []
    while len(history) < item.max_len and output[-1:] != [EOS]:
        bits = None if mask is None else mask.bits
        banned = [] if bits is None else [t for t in range(VOCAB_SIZE) if not bits[0] >> t & 1]
        salt = salt_of(item.sampling.temperature, item.sampling.seed, len(output))
        output.append(next_token(history, VOCAB_SIZE, salt, banned))
        history.append(output[-1])
        if mask is not None:
            mask.push(output[-1])
    return output


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_form_of_steps_changes_what_is_generated_or_scored(data: st.DataObject) -> None:
    """Chunks, segments, preemptions, prefixes and aborts."""
    setup: Setup = data.draw(setups())
    setup.engine = ScoringEngine(setup.engine)  # type: ignore[assignment]
    items: list[tuple[Request, Pairs]] = []
    for number in range(data.draw(st.integers(1, 8))):
        length = data.draw(st.integers(1, setup.max_model_len - 1))
        max_len = data.draw(st.integers(length + 1, setup.max_model_len))
        scored = data.draw(st.sampled_from([-1, 0, 3]))
        item = request(number, length, max_len, prompt_logprobs=scored)
        item.prompt_token_ids[: length // 2] = np.arange(length // 2) % VOCAB_SIZE
        pairs: Pairs = []
        if data.draw(st.booleans()):
            first = data.draw(st.integers(0, VOCAB_SIZE - 1))
            pairs = [(t, u) for t in range(first, VOCAB_SIZE) for u in range(0, VOCAB_SIZE, 2)]
            item.token_mask = BadWords(pairs, VOCAB_SIZE)
        items.append((item, pairs))
    arrivals = sorted(data.draw(st.integers(0, 20)) for _ in items)
    aborted = {item.id for item, _ in items if data.draw(st.integers(0, 5)) == 0}
    for turn in range(21):
        setup.add(*(own[0] for own, at in zip(items, arrivals, strict=True) if at == turn))
        setup.turn()
    for name in sorted(aborted):
        setup.state.end(name, "abort", 0.0)
    setup.finish()
    for item, pairs in items:
        tokens, prompt = expected_tokens(item, pairs), item.prompt_token_ids.tolist()
        scores = [score(i, *pair) for i, pair in enumerate(pairwise(prompt))]
        found = [one.logprob for one in item.prompt_logprobs]
        if item.sampling.prompt_logprobs < 0:
            assert found == []
        if item.finish_reason == "abort":
            assert item.output_token_ids == tokens[: len(item.output_token_ids)]
            assert found == scores[: len(found)]
            continue
        assert item.output_token_ids == tokens
        assert item.sampling.prompt_logprobs < 0 or found == scores
        assert {len(one.top) for one in item.prompt_logprobs} <= {item.sampling.prompt_logprobs}
