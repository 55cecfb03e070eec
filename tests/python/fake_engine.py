"""A deterministic engine in NumPy that checks each batch against csrc/pipeline/batch.h.

It keeps a shadow of the KV cache that holds the token and the position instead of key and value, so
that each request's context must turn out to be its token history. The next token is a hash of that
history, hence the same whatever the batching.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow.request import Request

INVALID_LOGITS = -2
DTYPES = {
    **dict.fromkeys(("tokens", "positions", "request_indptr", "kv_len"), np.int32),
    **dict.fromkeys(("page_indptr", "page_indices", "segment_requests"), np.int32),
    **dict.fromkeys(("sample_rows", "slots", "top_k", "counter"), np.int32),
    **dict.fromkeys(("banned_indptr", "banned"), np.int32),
    **dict.fromkeys(("temperature", "top_p", "min_p"), np.float32),
    "seed": np.uint64,
}
PENALTIES = {
    **dict.fromkeys(("history_indptr", "history_tokens"), np.int32),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), np.float32),
}
MASKS = {"mask_rows": np.int32, "masks": np.int32}
OPTIONAL_DTYPES = {**PENALTIES, **MASKS, "logprobs": np.int32, "targets": np.int32}


@dataclass
class FakeBatch:
    """The arrays of a step, copied as the engine does."""

    arrays: dict[str, NDArray[Any]]

    def __getattr__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]


def make_batch(**arrays: NDArray[Any]) -> FakeBatch:
    optional = arrays.keys() & OPTIONAL_DTYPES.keys()
    assert arrays.keys() - optional == DTYPES.keys()
    for group in (PENALTIES, MASKS):
        assert not optional & group.keys() or optional >= group.keys()
    for name, array in arrays.items():
        dtype = (DTYPES | OPTIONAL_DTYPES)[name]
        assert array.dtype == dtype, f"{name} is {array.dtype}"
        assert array.ndim == 1
    return FakeBatch({name: array.copy() for name, array in arrays.items()})


def next_token(
    history: Sequence[int], vocab_size: int, salt: int = 0, banned: Collection[int] = ()
) -> int:
    """What the fake model says after a history; `salt` stands for the random draw."""
    data = np.asarray(history, np.int32).tobytes() + int(salt).to_bytes(16, "little")
    draw = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    allowed = [token for token in range(vocab_size) if token not in banned]
    return allowed[draw % len(allowed)]


def salt_of(temperature: float, seed: int, counter: int) -> int:
    return 0 if temperature == 0 else seed * (1 << 32) + counter + 1


@dataclass
class FakeResult:
    tokens: NDArray[np.int32]
    logprobs: None = None


@dataclass
class FakeHandle:
    engine: FakeEngine
    step: int

    def is_done(self) -> bool:
        return self.engine.completed_steps >= self.step

    def wait(self) -> FakeResult:
        self.engine.run_until(self.step)
        outcome = self.engine.outcomes.pop(self.step)
        if isinstance(outcome, Exception):
            raise outcome
        return FakeResult(outcome)


@dataclass
class FakeCopy:
    """Loads are done with the step behind them, stores as late as can be: when waited for."""

    engine: FakeEngine
    pages: NDArray[np.int32]
    slots: NDArray[np.int32]
    step: int  # that must have run
    is_load: bool

    def wait(self) -> float:
        self.engine.run_until(self.step)
        if not self.is_load:
            self.engine.finish_store(self)
        return 1e-3


@dataclass
class FakeEngine:
    """Steps run when somebody waits for them, or at random earlier moments given a generator."""

    vocab_size: int
    num_pages: int
    page_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    segments: int = 1
    host_slots: int = 0
    early: np.random.Generator | None = None
    fail_at: Collection[int] = ()  # numbers of steps that fail, and all until a restart
    restart_fails: bool = False
    invalid_seeds: frozenset[int] = frozenset()  # whose logits are NaN

    completed_steps: int = 0
    submitted: int = 0
    outcomes: dict[int, NDArray[np.int32] | Exception] = field(default_factory=dict)
    batches: list[FakeBatch] = field(default_factory=list)  # all of them, for tests to look at

    def __post_init__(self) -> None:
        self._queue: deque[FakeBatch] = deque()
        self._stored = np.full((self.num_pages, self.page_size, 2), -1)  # token, position
        self._host = np.full((self.host_slots, self.page_size, 2), -1)
        self._stores: list[FakeCopy] = []  # unfinished
        self._loads: list[FakeCopy] = []  # unfinished
        self._pool = np.full(self.max_num_seqs, -1)
        self._pool_seed: dict[int, int] = {}
        self._samples: dict[int, int] = {}  # by seed, which stands for the request
        self._failure: RuntimeError | None = None
        self.restarts = 0

    def submit(self, batch: FakeBatch) -> FakeHandle:
        assert len(self._queue) < 2, "a third step in flight"
        if self._failure is not None:
            raise self._failure
        self._check(batch)
        self._check_not_in_use(batch)
        self.submitted += 1
        self.batches.append(batch)
        self._queue.append(batch)
        if self.early is not None:
            self.run_until(self.completed_steps + int(self.early.integers(len(self._queue) + 1)))
        return FakeHandle(self, self.submitted)

    def set_schedule(self, segments: int) -> None:
        """All that a schedule is here."""
        self.segments = segments

    @property
    def host_pool(self) -> NDArray[np.uint8]:
        return self._host.view(np.uint8).reshape(self.host_slots, -1)

    def store_pages(self, pages: NDArray[np.int32], slots: NDArray[np.int32]) -> FakeCopy:
        assert len(pages) == len(slots) == len(set(slots.tolist())) > 0
        for load in self._loads:
            assert not np.isin(slots, load.slots).any(), "a slot that is being loaded"
        self._stores.append(FakeCopy(self, pages, slots, self.submitted, is_load=False))
        return self._stores[-1]

    def finish_store(self, store: FakeCopy) -> None:
        self._stores.remove(store)
        self._host[store.slots] = self._stored[store.pages]

    def load_pages(self, pages: NDArray[np.int32], slots: NDArray[np.int32]) -> FakeCopy:
        assert len(pages) == len(slots) == len(set(pages.tolist())) > 0
        for other in [*self._queue, *self._stores, *self._loads]:
            in_use = other.page_indices if isinstance(other, FakeBatch) else other.pages
            assert not np.isin(pages, in_use).any(), "a page in use"
        for store in self._stores:
            assert not np.isin(slots, store.slots).any(), "a slot that is being stored to"
        self._loads.append(FakeCopy(self, pages, slots, self.submitted + 1, is_load=True))
        return self._loads[-1]

    def restart(self) -> None:
        assert not self._queue, "a restart with steps in flight"
        self.restarts += 1
        if self.restart_fails:
            raise RuntimeError("planted failure of the restart")
        self._failure = None
        assert not (self._stores or self._loads), "a restart with copies on their way"
        self._stored[:] = -1
        self._pool[:] = -1
        self._pool_seed.clear()

    def run_until(self, step: int) -> None:
        while self.completed_steps < step:
            batch = self._queue.popleft()
            number = self.completed_steps + 1
            for load in [load for load in self._loads if load.step == number]:
                self._stored[load.pages] = self._host[load.slots]
                self._loads.remove(load)
            if number in self.fail_at:
                self._failure = RuntimeError("planted failure")
            if self._failure is not None:
                self.outcomes[number] = self._failure
            else:
                self.outcomes[number] = self._run(batch)
            self.completed_steps = number

    def _check(self, b: FakeBatch) -> None:
        rows, requests = len(b.tokens), len(b.kv_len)
        assert 1 <= rows <= self.max_num_batched_tokens
        assert 1 <= requests <= self.max_num_seqs
        assert len(b.positions) == rows
        assert np.all((b.tokens >= -self.max_num_seqs) & (b.tokens < self.vocab_size))
        for name, entries, total in (
            ("request_indptr", requests, rows),
            ("page_indptr", requests, len(b.page_indices)),
            ("segment_requests", self.segments, requests),
            ("banned_indptr", len(b.slots), len(b.banned)),
        ):
            indptr = b.arrays[name]
            assert len(indptr) == entries + 1, name
            assert indptr[0] == 0 and indptr[-1] == total and np.all(np.diff(indptr) >= 0), name
        counts = np.diff(b.request_indptr)
        assert np.all(counts >= 1)
        assert np.all((counts <= b.kv_len) & (b.kv_len < self.max_model_len))
        pages = np.diff(b.page_indptr)
        assert np.all(pages == -(-b.kv_len // self.page_size)), "pages beyond those needed"
        assert np.all((b.page_indices >= 0) & (b.page_indices < self.num_pages))
        holders = np.bincount(b.page_indices, minlength=self.num_pages)
        written = b.page_indices[self._entries(b)]
        assert np.all(holders[written] == 1), "a page that requests share is written"
        ends = np.repeat(b.request_indptr[1:], counts)
        expected = np.repeat(b.kv_len, counts) - ends + np.arange(rows)
        assert np.array_equal(b.positions, expected)
        self._check_samples(b)

    def _check_samples(self, b: FakeBatch) -> None:
        for name in ("slots", "temperature", "top_p", "min_p", "top_k", "seed", "counter"):
            assert len(b.arrays[name]) == len(b.sample_rows), name
        assert np.all(np.isin(b.sample_rows, b.request_indptr[1:] - 1)), "not a last row"
        assert len(np.unique(b.slots)) == len(b.slots), "a slot takes two samples"
        assert np.all((b.slots >= 0) & (b.slots < self.max_num_seqs))
        assert np.all(b.temperature >= 0) and np.all((b.top_p > 0) & (b.top_p <= 1))
        assert np.all((b.banned >= 0) & (b.banned < self.vocab_size))

    def _check_not_in_use(self, b: FakeBatch) -> None:
        """Pages and pool slots pass to another request only when no step in flight uses them."""
        begun = b.page_indices[self._entries(b)[b.positions % self.page_size == 0]]
        for store in self._stores:
            assert not np.isin(begun, store.pages).any(), "a page that is being stored"
        for other in self._queue:
            assert not np.isin(begun, other.page_indices).any(), "a page of a step in flight"
            owners = dict(zip(other.slots.tolist(), other.seed.tolist(), strict=True))
            for slot, seed in zip(b.slots.tolist(), b.seed.tolist(), strict=True):
                assert owners.get(slot, seed) == seed, "a pool slot of a step in flight"

    def _entries(self, b: FakeBatch) -> NDArray[np.int64]:
        """The entry of page_indices that each row is stored under."""
        begin = np.repeat(b.page_indptr[:-1], np.diff(b.request_indptr))
        return begin + b.positions // self.page_size

    def _run(self, b: FakeBatch) -> NDArray[np.int32]:
        pooled = b.tokens < 0
        tokens = np.where(pooled, self._pool[-1 - np.minimum(b.tokens, -1)], b.tokens)
        stored_at = b.page_indices[self._entries(b)], b.positions % self.page_size
        self._stored[stored_at] = np.stack([tokens, b.positions], axis=1)
        request_of = np.searchsorted(b.request_indptr, b.sample_rows, side="right") - 1
        sampled = np.full(len(b.sample_rows), INVALID_LOGITS, np.int32)
        for request in range(len(b.kv_len)):
            self._history(b, request)
        for i, request in enumerate(request_of.tolist()):
            seed, counter = int(b.seed[i]), int(b.counter[i])
            assert counter == self._samples.get(seed, 0), "counter is not the tokens sampled before"
            self._samples[seed] = counter + 1
            slot = int(b.slots[i])
            if pooled[b.sample_rows[i]]:
                assert b.tokens[b.sample_rows[i]] == -1 - slot, "another request's pool slot"
                assert self._pool_seed[slot] == seed, "the pool slot has another's token"
            if seed not in self.invalid_seeds:
                banned = b.banned[b.banned_indptr[i] : b.banned_indptr[i + 1]].tolist()
                banned += self._masked(b, i)
                salt = salt_of(float(b.temperature[i]), seed, counter)
                history = self._history(b, request)
                sampled[i] = next_token(history, self.vocab_size, salt, banned)
            self._pool_seed[slot] = seed
        self._pool[b.slots] = np.maximum(sampled, 0)
        return sampled

    def _masked(self, b: FakeBatch, sample: int) -> list[int]:
        """Tokens that the mask of a sampled row leaves out."""
        if "masks" not in b.arrays or b.mask_rows[sample] < 0:
            return []
        bits = b.masks.reshape(-1, -(-self.vocab_size // 32))[b.mask_rows[sample]]
        return [t for t in range(self.vocab_size) if not bits[t // 32] >> t % 32 & 1]

    def _history(self, b: FakeBatch, request: int) -> NDArray[np.int64]:
        """The tokens a request's last row attends to; their positions must be 0, 1, 2, ..."""
        pages = b.page_indices[b.page_indptr[request] : b.page_indptr[request + 1]]
        stored = self._stored[pages].reshape(-1, 2)[: b.kv_len[request]]
        assert np.array_equal(stored[:, 1], np.arange(len(stored))), "the cache is corrupt"
        history: NDArray[np.int64] = stored[:, 0]
        return history


def expected_output(request: Request, vocab_size: int) -> tuple[list[int], str, int | None]:
    """What a request without stop strings must give: tokens, finish reason, stop reason."""
    sampling = request.sampling
    stops, eos = set(sampling.stop_token_ids), set(sampling.eos_token_ids)
    ends = stops if sampling.ignore_eos else stops | eos
    history, output = request.prompt_token_ids.tolist(), []
    while len(history) < request.max_len:
        banned = stops | eos if len(output) < sampling.min_tokens else set()
        salt = salt_of(sampling.temperature, sampling.seed, len(output))
        token = next_token(history, vocab_size, salt, banned)
        history.append(token)
        output.append(token)
        if token in ends:
            is_eos = token in eos and not sampling.ignore_eos
            return output, "stop", None if is_eos else token
    return output, "length", None
