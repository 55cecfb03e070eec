"""A step made up for plans, pictures and timelines: some requests decode, others prefill."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from nanoflow import _core
from nanoflow.scheduler.deal import Dealer

PAGE_SIZE = 64
WARM_UP_STEPS = 2  # plans are made, memory and clocks get warm

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepMix:
    """What a step computes."""

    decodes: int  # requests of one row each
    context: int  # keys that each of them reads; tokens of a prompt, at most
    prefill_rows: int = 0  # rows of whole prompts

    def check(self, max_positions: int) -> None:
        """Raises ValueError on sizes that a model of so many positions cannot run."""
        if self.decodes < 0 or self.prefill_rows < 0 or self.decodes + self.prefill_rows < 1:
            raise ValueError(
                f"--rows {self.decodes} and --prefill-rows {self.prefill_rows} must not be below "
                "0, and at least 1 together"
            )
        if not 1 <= self.context <= max_positions:
            raise ValueError(
                f"--context {self.context} must be from 1 to the model's {max_positions} positions"
            )


@dataclass(frozen=True, slots=True)
class MixedStep:
    """The requests of a step in order: in every segment the decodes, then the prompts."""

    rows: Ints  # [R] of each request
    kv_len: Ints  # [R] keys once these rows are appended
    segment_requests: Ints  # [segments + 1] first request of each segment

    @property
    def segment_rows(self) -> list[int]:
        bounds = np.concatenate([[0], np.cumsum(self.rows)])[self.segment_requests]
        rows: list[int] = np.diff(bounds).tolist()
        return rows

    def engine_config(self) -> _core.EngineConfig:
        """Capacities for this step and no more."""
        return capacities([self])

    def batch(
        self, vocab_size: int, *, want_timings: bool = True, first_page: int = 0
    ) -> _core.Batch:
        """On pages from `first_page` on. The keys before its rows are whatever the cache holds: for
        measuring, not for reading the tokens."""
        requests, total = len(self.rows), int(self.rows.sum())
        ends = np.cumsum(self.rows)
        first_position = self.kv_len - self.rows
        pages = self.pages()

        def ints(values: Ints) -> NDArray[np.int32]:
            return values.astype(np.int32)

        def filled(value: float) -> NDArray[np.float32]:
            return np.full(requests, value, np.float32)

        zeros = np.zeros(requests, np.int32)
        within = np.arange(total) - np.repeat(ends - self.rows, self.rows)
        return _core.Batch(
            tokens=ints(np.arange(total) % vocab_size),
            positions=ints(np.repeat(first_position, self.rows) + within),
            request_indptr=ints(np.concatenate([[0], ends])),
            kv_len=ints(self.kv_len),
            page_indptr=ints(np.concatenate([[0], np.cumsum(pages)])),
            page_indices=ints(first_page + np.arange(pages.sum())),
            segment_requests=ints(self.segment_requests),
            sample_rows=ints(ends - 1),
            slots=ints(np.arange(requests)),
            temperature=filled(0),
            top_p=filled(1),
            min_p=filled(0),
            top_k=zeros,
            seed=np.zeros(requests, np.uint64),
            counter=zeros,
            banned_indptr=np.zeros(requests + 1, np.int32),
            banned=np.zeros(0, np.int32),
            want_timings=want_timings,
        )

    def pages(self) -> Ints:
        return -(-self.kv_len // PAGE_SIZE)


def capacities(steps: Sequence[MixedStep], divided: int = 0) -> _core.EngineConfig:
    """Of an engine that can run each of these steps, also where cuts divide so many prompts more:
    a part is a request of its own, whose last page may not be full."""
    return _core.EngineConfig(
        max_num_batched_tokens=max(int(step.rows.sum()) for step in steps),
        max_num_seqs=max(len(step.rows) for step in steps) + divided,
        max_model_len=max(int(step.kv_len.max()) for step in steps),
        page_size=PAGE_SIZE,
        num_pages=max(int(step.pages().sum()) for step in steps) + divided,
    )


def filling(config: _core.EngineConfig) -> Iterator[tuple[MixedStep, int]]:
    """Steps, with their first pages, that write keys and values to all pages of an engine: a GPU
    takes less time and energy for the zeros that are there before."""
    length = min(config.max_model_len, config.max_num_batched_tokens)
    length -= length % PAGE_SIZE if length > PAGE_SIZE else 0
    prompts = min(config.max_num_batched_tokens // length, config.max_num_seqs)
    pages = -(-length // PAGE_SIZE)
    prompts = max(1, min(prompts, config.num_pages // pages))
    step = deal_step(StepMix(0, length, prompts * length), [])
    for first in range(0, config.num_pages, prompts * pages):
        yield step, min(first, config.num_pages - prompts * pages)


def deal_step(mix: StepMix, cuts: list[float]) -> MixedStep:
    """Requests as a scheduler would deal them to the segments between a schedule's cuts."""
    dealer = Dealer(cuts, max(1, mix.decodes))
    dealt = dealer.deal_decodes(np.full(mix.decodes, mix.context, np.int64))
    decodes = np.bincount(dealt, minlength=dealer.segments)
    rows: list[int] = []
    kv_len: list[int] = []
    segment_requests = [0]
    for count, share in zip(
        decodes.tolist(), dealer.shares(mix.prefill_rows).tolist(), strict=True
    ):
        prompts = [min(mix.context, share - row) for row in range(0, share, mix.context)]
        rows += [1] * count + prompts
        kv_len += [mix.context] * count + prompts
        segment_requests.append(len(rows))
    return MixedStep(np.array(rows), np.array(kv_len), np.array(segment_requests))


def run_steps(engine: _core.Engine, batch: _core.Batch, steps: int) -> list[_core.StepResult]:
    """The last `steps` of some more equal steps."""
    return list(issue(engine, repeat(batch, WARM_UP_STEPS + steps)))[WARM_UP_STEPS:]


def issue(engine: _core.Engine, batches: Iterable[_core.Batch]) -> Iterator[_core.StepResult]:
    """Results of steps that are issued as a scheduler does: two are in flight."""
    in_flight: deque[_core.StepHandle] = deque()
    for batch in batches:
        if len(in_flight) == 2:
            yield in_flight.popleft().wait()
        in_flight.append(engine.submit(batch))
    for handle in in_flight:
        yield handle.wait()
