"""Drives `_core.Engine` step by step, without the scheduler: tests say how rows are batched."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanoflow import _core
from nanoflow.loading import RankStores, open_checkpoint
from random_models import fill

PAGE_SIZE = 4


@dataclass
class Sequence:
    """A request as a test sees it: its tokens so far, and how many of them the engine has taken."""

    tokens: list[int]
    slot: int
    temperature: float = 0.0
    pages: list[int] = field(default_factory=list)
    computed: int = 0


@dataclass(frozen=True)
class Chunk:
    """`rows` next tokens of a sequence; only the last row is sampled unless `all_logits`."""

    sequence: Sequence
    rows: int
    all_logits: bool = False


def load_engine(
    model: Path,
    schedule: _core.Schedule,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int = 4,
    isa: str = "auto",
    max_rows: int = 512,
    max_seqs: int = 256,
    max_model_len: int = 128,
    page_size: int = PAGE_SIZE,
    jitter_us: int = 0,
    row_granularity: int = 0,
    enforce_eager: bool = False,
    host_slots: int = 0,
    random_weights: bool = False,
    ranks: int = 1,
) -> _core.Engine:
    """Of a checkpoint, or of a config.json alone with weights of random_models.py."""
    checkpoint = open_checkpoint(model, "dummy" if random_weights else "auto")
    spec = _core.ModelSpec(**checkpoint.model.spec_arguments(dtype, max_model_len))
    backends = _core.make_backends(device, ranks, threads if device == "cpu" else 0, isa)
    weights = [_core.Weights(spec, backend, schedule.gathers) for backend in backends]
    store = RankStores(weights)
    if random_weights:
        fill(store)
    else:
        checkpoint.load_weights(store)
    config = _core.EngineConfig(
        max_num_batched_tokens=max_rows,
        max_num_seqs=max_seqs,
        max_model_len=max_model_len,
        page_size=page_size,
        num_pages=16 * max_model_len // page_size,
        host_slots=host_slots,
        jitter_us=jitter_us,
        row_granularity=row_granularity,
        enforce_eager=enforce_eager,
    )
    return _core.Engine(config, weights, schedule)


class EngineDriver:
    """Builds batches from chunks dealt to segments, and keeps pages and slots."""

    def __init__(self, engine: _core.Engine, seed: int = 0) -> None:
        self.engine = engine
        # Pages are handed out in random order, so that nothing works by their being consecutive.
        pages = np.random.default_rng(seed).permutation(engine.config.num_pages)
        self._free_pages = [int(page) for page in pages]
        self._next_slot = 0

    def add(self, tokens: list[int], temperature: float = 0.0) -> Sequence:
        """A sequence whose samples are drawn at this temperature, seeded by its slot."""
        sequence = Sequence(list(tokens), self._next_slot, temperature)
        self._next_slot += 1
        return sequence

    def release(self, sequence: Sequence) -> None:
        """Gives its pages back; no step may be in flight."""
        self._free_pages += sequence.pages
        sequence.pages = []

    def batch(self, segments: list[list[Chunk]], want_timings: bool = False) -> _core.Batch:
        tokens, positions, indptr, kv_len = [], [], [0], []
        page_indptr, page_indices, segment_requests = [0], [], [0]
        sample_rows, slots, counters, temperatures = [], [], [], []
        spare_slots = iter(range(self.engine.config.max_num_seqs - 1, -1, -1))
        for segment in segments:
            for chunk in segment:
                s = chunk.sequence
                begin, end = s.computed, s.computed + chunk.rows
                tokens += s.tokens[begin:end]
                positions += range(begin, end)
                while len(s.pages) * self.engine.config.page_size < end:
                    s.pages.append(self._free_pages.pop())
                page_indices += s.pages
                page_indptr.append(len(page_indices))
                kv_len.append(end)
                indptr.append(len(tokens))
                s.computed = end
                if chunk.all_logits:
                    sample_rows += range(indptr[-2], indptr[-1])
                    slots += [next(spare_slots) for _ in range(chunk.rows)]
                    counters += [0] * chunk.rows
                    temperatures += [0.0] * chunk.rows
                elif end == len(s.tokens):
                    sample_rows.append(indptr[-1] - 1)
                    slots.append(s.slot)
                    counters.append(end)
                    temperatures.append(s.temperature)
            segment_requests.append(len(kv_len))
        n = len(sample_rows)

        def ints(values: list[int]) -> NDArray[np.int32]:
            return np.asarray(values, dtype=np.int32)

        return _core.Batch(
            tokens=ints(tokens),
            positions=ints(positions),
            request_indptr=ints(indptr),
            kv_len=ints(kv_len),
            page_indptr=ints(page_indptr),
            page_indices=ints(page_indices),
            segment_requests=ints(segment_requests),
            sample_rows=ints(sample_rows),
            slots=ints(slots),
            temperature=np.asarray(temperatures, np.float32),
            top_p=np.ones(n, np.float32),
            min_p=np.zeros(n, np.float32),
            top_k=ints([0] * n),
            seed=np.asarray(slots, np.uint64),
            counter=ints(counters),
            banned_indptr=ints([0] * (n + 1)),
            banned=ints([]),
            want_logits=n > 0,
            want_timings=want_timings,
        )

    def step(self, segments: list[list[Chunk]]) -> _core.StepResult:
        """Runs one step; sampled tokens are appended to their sequences (not for all_logits)."""
        batch = self.batch(segments)
        result = self.engine.submit(batch).wait()
        sampled = iter(result.tokens.tolist())
        for chunk in (chunk for segment in segments for chunk in segment):
            s = chunk.sequence
            if chunk.all_logits:
                for _ in range(chunk.rows):
                    next(sampled)
            elif s.computed == len(s.tokens):
                s.tokens.append(next(sampled))
        return result
