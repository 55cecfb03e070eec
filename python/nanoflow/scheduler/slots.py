"""What the scheduler knows of its running requests, as arrays indexed by slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from nanoflow.request import Request, TokenLogprobs
from nanoflow.scheduler.engine import StepLogprobs

Ints = NDArray[np.int64]
NO_TOKEN = -1


class SlotState(IntEnum):
    FREE = 0  # nobody's
    RUNNING = 1  # takes part in steps
    PREEMPTED = 2  # gave its pages up; a token in flight may still arrive and counts
    ENDED = 3  # finished; what still arrives is dropped


# As plain numbers: members of an enum are looked up slowly.
_RUNNING, _PREEMPTED = int(SlotState.RUNNING), int(SlotState.PREEMPTED)


class Slots:
    """Structure of arrays; a request keeps its slot, its place in the token pool, while it runs.

    Token positions: `[0, computed)` are stored, or will be by steps on their way; `[0, known)` have
    arrived; `[0, prefill_len)` were known on admission (a preempted request comes back with what it
    had generated). Once `computed >= prefill_len` the request decodes: one token of it, at position
    `computed`, is known or in flight.
    """

    def __init__(self, num_slots: int, max_model_len: int, page_size: int) -> None:
        self.page_size = page_size
        self.requests: list[Request | None] = [None] * num_slots
        self.running: Ints = np.empty(0, np.int64)  # slots that run, by age
        self.state = np.full(num_slots, SlotState.FREE, np.int8)
        self.age: Ints = np.zeros(num_slots, np.int64)  # of the request: lower ones go first
        self.priority: Ints = np.zeros(num_slots, np.int64)  # likewise; ages are by it first

        self.prompt_len: Ints = np.zeros(num_slots, np.int64)
        self.prefill_len: Ints = np.zeros(num_slots, np.int64)
        self.computed: Ints = np.zeros(num_slots, np.int64)
        self.known: Ints = np.zeros(num_slots, np.int64)
        self.max_len: Ints = np.zeros(num_slots, np.int64)
        self.last_step: Ints = np.zeros(num_slots, np.int64)  # the last one it took part in
        self.first_token_time = np.zeros(num_slots, np.float64)
        # Rows of untouched memory cost nothing until they are written.
        self.tokens = np.empty((num_slots, max_model_len), np.int32)

        self.num_pages: Ints = np.zeros(num_slots, np.int64)
        self.num_shared: Ints = np.zeros(num_slots, np.int64)  # of them, others may find: the first
        self.pages = np.empty((num_slots, -(-max_model_len // page_size)), np.int32)

        self.temperature = np.zeros(num_slots, np.float32)
        self.top_p = np.ones(num_slots, np.float32)
        self.min_p = np.zeros(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int32)
        self.seed = np.zeros(num_slots, np.uint64)
        self.has_penalties = np.zeros(num_slots, np.bool_)
        self.presence_penalty = np.zeros(num_slots, np.float32)
        self.frequency_penalty = np.zeros(num_slots, np.float32)
        self.repetition_penalty = np.ones(num_slots, np.float32)
        self.has_bias = np.zeros(num_slots, np.bool_)
        self.has_mask = np.zeros(num_slots, np.bool_)
        # Its mask depends on its last token: it takes part in no step before that has arrived.
        self.binds_late = np.zeros(num_slots, np.bool_)
        self.logprobs = np.full(num_slots, -1, np.int32)  # -1: none
        self.prompt_logprobs = np.full(num_slots, -1, np.int32)  # -1: none that are missing
        self.first_unscored: Ints = np.zeros(num_slots, np.int64)  # token of the prompt, on start
        self.min_tokens: Ints = np.zeros(num_slots, np.int64)
        self.has_stop_strings = np.zeros(num_slots, np.bool_)
        self.number: Ints = np.zeros(num_slots, np.int64)  # by which the forecast knows it
        self.expected_len: Ints = np.zeros(num_slots, np.int64)  # by the forecast
        self.is_length_certain = np.zeros(num_slots, np.bool_)
        self.is_streamed = np.zeros(num_slots, np.bool_)
        # A row: stop tokens, end-of-sequence tokens, then what is only banned by min_tokens.
        self.end_ids = np.full((num_slots, 4), NO_TOKEN, np.int32)
        self.num_stop_ids: Ints = np.zeros(num_slots, np.int64)  # the first, which are stop reasons
        self.num_end_ids: Ints = np.zeros(num_slots, np.int64)  # the first, which end the request
        self.num_banned_ids: Ints = np.zeros(num_slots, np.int64)  # all of them

    def assign(self, slot: int, request: Request, age: int, pages: Sequence[int] = ()) -> None:
        """Gives a free slot to a request of an age that no running one has.

        `pages` are full and hold its first tokens already.
        """
        assert self.state[slot] == SlotState.FREE
        prompt_len, length = len(request.prompt_token_ids), request.num_tokens
        self.requests[slot] = request
        self.state[slot] = SlotState.RUNNING
        at = int(np.searchsorted(self.age[self.running], age))
        self.running = np.concatenate([self.running[:at], [slot], self.running[at:]])
        self.age[slot] = age
        self.priority[slot] = request.priority
        self.prompt_len[slot] = prompt_len
        self.prefill_len[slot] = self.known[slot] = length
        self.last_step[slot] = 0
        self.pages[slot, : len(pages)] = pages
        self.num_pages[slot] = self.num_shared[slot] = len(pages)
        self.computed[slot] = len(pages) * self.page_size
        self.max_len[slot] = self.expected_len[slot] = request.max_len
        self.first_token_time[slot] = request.first_token_time
        self.tokens[slot, :prompt_len] = request.prompt_token_ids
        self.tokens[slot, prompt_len:length] = request.output_token_ids
        self._assign_sampling(slot, request)

    def _assign_sampling(self, slot: int, request: Request) -> None:
        sampling = request.sampling
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.min_p[slot] = sampling.min_p
        self.top_k[slot] = sampling.top_k
        self.seed[slot] = sampling.seed
        self.has_penalties[slot] = sampling.has_penalties
        self.presence_penalty[slot] = sampling.presence_penalty
        self.frequency_penalty[slot] = sampling.frequency_penalty
        self.repetition_penalty[slot] = sampling.repetition_penalty
        self.logprobs[slot] = sampling.logprobs
        self.has_bias[slot] = sampling.bias is not None
        self.has_mask[slot] = request.token_mask is not None
        self.binds_late[slot] = request.token_mask is not None and not request.token_mask.is_fixed
        self.prompt_logprobs[slot] = sampling.prompt_logprobs if request.scores_prompt else -1
        self.first_unscored[slot] = 1 + len(request.prompt_logprobs)
        self.min_tokens[slot] = sampling.min_tokens
        self.has_stop_strings[slot] = request.stop_watcher is not None
        self.number[slot] = request.number
        self.is_length_certain[slot] = request.is_length_certain
        self.is_streamed[slot] = request.on_token is not None
        eos = sampling.eos_token_ids
        stop = tuple(i for i in sampling.stop_token_ids if sampling.ignore_eos or i not in eos)
        banned = tuple(dict.fromkeys(stop + eos))
        if len(banned) > self.end_ids.shape[1]:
            wider = np.full((len(self.end_ids), len(banned)), NO_TOKEN, np.int32)
            wider[:, : self.end_ids.shape[1]] = self.end_ids
            self.end_ids = wider
        self.end_ids[slot] = NO_TOKEN
        self.end_ids[slot, : len(banned)] = banned
        self.num_stop_ids[slot] = len(stop)
        self.num_end_ids[slot] = len(stop) if sampling.ignore_eos else len(banned)
        self.num_banned_ids[slot] = len(banned)

    def leave(self, slots: Sequence[int], state: SlotState) -> None:
        """Running slots stop taking part in steps."""
        self.state[slots] = state
        self.running = self.running[self.state[self.running] == _RUNNING]

    def takes_tokens(self, slots: Ints) -> NDArray[np.bool_]:
        """Whether what has been sampled for each counts."""
        state = self.state[slots]
        takes: NDArray[np.bool_] = (state == _RUNNING) | (state == _PREEMPTED)
        return takes

    def free(self, slot: int) -> None:
        """Makes a slot assignable once no step on its way names it."""
        self.state[slot] = SlotState.FREE
        self.requests[slot] = None

    def request(self, slot: int) -> Request:
        request = self.requests[slot]
        assert request is not None
        return request

    def generated(self, slot: int) -> list[int]:
        """The tokens that have been generated and have arrived."""
        tokens: list[int] = self.tokens[slot, self.prompt_len[slot] : self.known[slot]].tolist()
        return tokens

    def take_logprobs(self, sampled: Ints, rows: Ints, logprobs: StepLogprobs) -> None:
        """Gives requests that want them those of the tokens they take, rows of a step's."""
        wants = self.logprobs[sampled] >= 0
        if not wants.any():
            return
        found = rows_of(logprobs, rows[wants], self.logprobs[sampled[wants]])
        for slot, one in zip(sampled[wants].tolist(), found, strict=True):
            self.request(slot).logprobs.append(one)

    def stream(self, sampled: Ints, tokens: NDArray[np.int32]) -> None:
        """Tells requests that want to know of the tokens they take."""
        for row in np.flatnonzero(self.is_streamed[sampled]).tolist():
            on_token = self.request(int(sampled[row])).on_token
            assert on_token is not None
            on_token(int(tokens[row]))

    def pages_of(self, slot: int) -> NDArray[np.int32]:
        return self.pages[slot, : self.num_pages[slot]]

    def append_pages(self, takers: Ints, counts: Ints, pages: NDArray[np.int32]) -> None:
        """Gives `pages` to takers in their order, so many to each."""
        begin = self.num_pages[takers] - (np.cumsum(counts) - counts)
        places = np.repeat(begin, counts) + np.arange(len(pages))
        self.pages[np.repeat(takers, counts), places] = pages
        self.num_pages[takers] += counts

    def pages_for(self, tokens: Ints) -> Ints:
        """Pages that hold so many tokens."""
        return (tokens + (self.page_size - 1)) // self.page_size


def rows_of(
    logprobs: StepLogprobs, rows: Ints, counts: NDArray[np.int32]
) -> Iterator[TokenLogprobs]:
    """Of some rows of a step, with so many of the likeliest tokens each."""
    top, values, ranks = logprobs.top, logprobs.logprobs, logprobs.ranks
    for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
        yield TokenLogprobs(
            logprob=float(values[row, 0]),
            rank=int(ranks[row]),
            top=top[row, :count].copy(),
            top_logprobs=values[row, 1 : 1 + count].copy(),
        )
