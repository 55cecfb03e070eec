"""A request on its way through the scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort", "error"]
# stop: an end-of-sequence token, a stop token or a stop string
# length: max_tokens or max_model_len
# abort: the caller gave it up
# error: it could not be run; Request.error says why


@dataclass(frozen=True, slots=True, eq=False)
class Bias:
    """What is added to the logits of some tokens."""

    tokens: NDArray[np.int32]  # each once at most
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """What sampling parameters come to once model and request are known."""

    temperature: float  # 0 is greedy
    top_p: float
    top_k: int  # 0 keeps all
    min_p: float
    seed: int  # uint64
    min_tokens: int  # eos_token_ids and stop_token_ids are banned while fewer are generated
    stop_token_ids: tuple[int, ...]  # end the request and are its stop_reason
    eos_token_ids: tuple[int, ...]  # end the request unless ignore_eos
    ignore_eos: bool
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int = -1  # how many tokens' beside that of the sampled one; -1: none at all
    prompt_logprobs: int = -1  # the same of each token of the prompt, beside that token's
    bias: Bias | None = None

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a generated token was, before penalties and temperature, and others beside it."""

    logprob: float
    rank: int  # among all tokens, from 1
    top: NDArray[np.int32]  # the likeliest tokens
    top_logprobs: NDArray[np.float32]


class TokenMask(Protocol):
    """Which tokens a sample may take next. The scheduler's once the request has been submitted."""

    @property
    def is_fixed(self) -> bool:
        """Whether it is the same for all tokens, and so known before the last one is."""

    @property
    def bits(self) -> NDArray[np.int32]:
        """[ceil(V / 32)] token t is allowed if bit t % 32 of t // 32 is 1."""

    def push(self, token: int) -> None:
        """Takes a token that has been sampled. What it raises ends the request with an error."""


class StopWatcher(Protocol):
    """Looks for stop strings in what is generated."""

    def push(self, token: int) -> str | None:
        """Takes the next token and returns the stop string it completes, if any."""


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and one sample of what follows it.

    Built by any thread, given to the scheduler, and its own until `on_finish` has been called from
    the scheduler's thread.
    """

    id: str
    prompt_token_ids: NDArray[np.int32]
    sampling: Sampling
    max_len: int  # prompt and generated tokens together, at most
    on_finish: Callable[[Request], None]  # must not block or raise
    stop_watcher: StopWatcher | None = None
    token_mask: TokenMask | None = None
    index: int = 0  # among the samples of its prompt
    priority: int = 0  # int32; lower ones go first
    timeout: float = math.inf  # seconds from its arrival; then it ends with what there is
    # Called from the scheduler's thread with each token as it arrives, before `on_finish`.
    on_token: Callable[[int], None] | None = None  # must not block or raise

    output_token_ids: list[int] = field(default_factory=list)  # complete once finished
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of each, where they are wanted
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of all but the first
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token
    error: BaseException | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # that were found in the KV cache when it first started
    number: int = 0  # of its first start, in the order of starts
    expected_tokens: int = 0  # to be generated, by the forecast when it first started
    is_prefetched: bool = False  # what only an SSD holds of it has been asked for
    page_keys: list[bytes] = field(default_factory=list)  # of its first pages (scheduler/prefix.py)
    arrival_time: float = 0.0  # seconds of time.perf_counter, as all times
    first_token_time: float = 0.0
    finished_time: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens that are known while the request waits."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are wanted that have not arrived."""
        missing = len(self.prompt_token_ids) - 1 - len(self.prompt_logprobs)
        return self.sampling.prompt_logprobs >= 0 and missing > 0

    @property
    def is_length_certain(self) -> bool:
        """Whether nothing but max_len ends it."""
        sampling = self.sampling
        return sampling.ignore_eos and not sampling.stop_token_ids and self.stop_watcher is None

    def finish(
        self,
        reason: FinishReason,
        time: float,
        *,
        stop_reason: str | int | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Ends the request, once, and tells its owner."""
        assert self.finish_reason is None, f"request {self.id} finishes twice"
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.error = error
        self.finished_time = time
        self.on_finish(self)
