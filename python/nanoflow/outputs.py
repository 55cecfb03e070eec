"""What generate() returns, with vLLM's names and fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanoflow.request import FinishReason


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely the model found a token, before penalties and temperature."""

    logprob: float
    rank: int | None = None  # among all tokens, from 1
    decoded_token: str | None = None  # None without detokenize


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """A generation."""

    index: int  # among the generations of the request
    text: str  # without the stop string or token, unless include_stop_str_in_output
    token_ids: list[int]  # all that were generated, the one that ended it included
    finish_reason: FinishReason | None
    # The stop string or stop token, None at end of sequence; "timeout" where that aborted it.
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None  # of all token_ids together
    # Of each of token_ids, by token: that token first, then as many of the likeliest as were asked
    # for, which it may be one of.
    logprobs: list[dict[int, Logprob]] | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds of time.perf_counter; 0 for what never happened."""

    arrival_time: float
    first_token_time: float
    finished_time: float
    num_preemptions: int  # how often it gave way and was recomputed


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its generations."""

    request_id: str
    prompt: str | None  # as text, when it was given so
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    error: str | None = None  # why it could not be run; outputs[0].finish_reason is then "error"
    num_cached_tokens: int = 0  # of the prompt, found in the KV cache
    # Of each token of the prompt, as CompletionOutput.logprobs; None for the first.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    lora_request: Any = None
