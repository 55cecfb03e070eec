"""How the tokens of a request are chosen and when it ends, with vLLM's names and defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Integral, Real
from typing import Any

from nanoflow.request import Sampling

MAX_BANNED_TOKENS = 64  # end-of-sequence and stop tokens of a request with min_tokens
MAX_LOGPROBS = 20  # of a generated token, beside it
_LEAST_REPETITION, _MOST_REPETITION = 1e-30, 1e30  # what float32 has room for
_GREEDY_TEMPERATURE = 1e-5  # and below: the logits would overflow


class RequestOutputKind(Enum):
    CUMULATIVE = 0  # every output holds all that has been generated
    DELTA = 1  # every output holds what is new
    FINAL_ONLY = 2  # there is one output, at the end


# Fields that are there for compatibility, with the values that change nothing.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "prompt_logprobs": (None,),
    "structured_outputs": (None,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "extra_args": (None, {}),
}


@dataclass(slots=True)
class SamplingParams:
    """Checked when made, and again when used, as fields may be set in between.

    Raises ValueError naming the field, TypeError on a value of another type or an unknown field.
    """

    n: int = 1  # samples of each prompt
    presence_penalty: float = 0.0  # off the logits of tokens that have been generated
    frequency_penalty: float = 0.0  # the same for each time
    # Divides positive and multiplies negative logits of tokens that were seen, the prompt's too.
    repetition_penalty: float = 1.0
    temperature: float = 1.0  # 0 is greedy: top_p, top_k and min_p then have no effect
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1 keep all
    min_p: float = 0.0
    # Of the first sample, one more for each other. None: drawn from the LLM's seed and the number
    # of the request.
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: as far as max_model_len goes
    min_tokens: int = 0
    logprobs: int | None = None  # of so many of the likeliest tokens, and of the one generated
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # no effect: detokenizers here put none there
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None  # the last so many alone; -1: as many as fit
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE  # of AsyncLLM; LLM has the last
    structured_outputs: Any = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.check()

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def check(self) -> None:
        """Raises what the class says."""
        self._check_types()
        for name, neutral in _NOT_YET.items():
            value = getattr(self, name)
            if value not in neutral:
                raise ValueError(
                    f"{name}={value!r} is not supported yet; leave it at {neutral[0]!r}"
                )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name}={getattr(self, name)} must be from -2 to 2")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be a number above 0"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(
                f"logprobs={self.logprobs} must be from 0 to {MAX_LOGPROBS}, or None for none"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k < -1:
            raise ValueError(
                f"top_k={self.top_k} must be at least 1, or 0 or -1 to keep all tokens"
            )
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be from 0 to 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1, or None")
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1")
        if self.n > 1 and self.temperature < _GREEDY_TEMPERATURE:
            raise ValueError(
                f"n={self.n} must be 1 when sampling is greedy (temperature={self.temperature}): "
                "all samples would be the same"
            )
        truncated = self.truncate_prompt_tokens
        if truncated is not None and (truncated == 0 or truncated < -1):
            raise ValueError(f"truncate_prompt_tokens={truncated} must be at least 1, -1 or None")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens={self.min_tokens} must be at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        if any(token < 0 for token in self.stop_token_ids or ()):
            raise ValueError(f"stop_token_ids={self.stop_token_ids} holds a negative id")
        if "" in self.stop_strings:
            raise ValueError("stop holds an empty string, which would end every request at once")
        if self.stop_strings and not self.detokenize:
            raise ValueError("stop strings are looked for in the text: they need detokenize=True")

    def _check_types(self) -> None:
        numbers = ("temperature", "top_p", "min_p")
        penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty")
        for name in numbers + penalties:
            _check_type(name, getattr(self, name), "a number", (Real,))
        for name in ("n", "top_k", "min_tokens"):
            _check_type(name, getattr(self, name), "an integer", (Integral,))
        for name in ("seed", "max_tokens", "logprobs", "truncate_prompt_tokens"):
            _check_type(name, getattr(self, name), "an integer or None", (Integral, type(None)))
        for flag in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"{flag}={getattr(self, flag)!r} must be True or False")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError(f"output_kind={self.output_kind!r} must be a RequestOutputKind")
        if isinstance(self.stop_token_ids, str | int):
            raise TypeError(f"stop_token_ids={self.stop_token_ids!r} must be a list of integers")
        for token in self.stop_token_ids or ():
            _check_type("stop_token_ids", token, "a list of integers", (Integral,))
        if not all(isinstance(stop, str) for stop in self.stop_strings):
            raise TypeError(f"stop={self.stop!r} must be a string or a list of strings")

    def resolve(
        self, eos_token_ids: Sequence[int], vocab_size: int, default_seed: int, index: int = 0
    ) -> Sampling:
        """What the scheduler needs, for a model and a sample.

        Raises ValueError on stop tokens outside the vocabulary, or more of them than min_tokens can
        keep from being sampled.
        """
        self.check()
        stop_token_ids = tuple(dict.fromkeys(self.stop_token_ids or ()))
        if outside := [token for token in stop_token_ids if token >= vocab_size]:
            raise ValueError(f"stop_token_ids {outside} are outside the vocabulary of {vocab_size}")
        ends = len({*stop_token_ids, *eos_token_ids})
        if self.min_tokens > 0 and ends > MAX_BANNED_TOKENS:
            raise ValueError(
                f"min_tokens={self.min_tokens} with {ends} stop and end-of-sequence tokens: at "
                f"most {MAX_BANNED_TOKENS} can be kept from being sampled"
            )
        is_greedy = self.temperature < _GREEDY_TEMPERATURE
        return Sampling(
            temperature=0.0 if is_greedy else float(self.temperature),
            top_p=1.0 if is_greedy else float(self.top_p),
            top_k=0 if is_greedy else min(max(self.top_k, 0), vocab_size),
            min_p=0.0 if is_greedy else float(self.min_p),
            seed=(default_seed if self.seed is None else self.seed + index) % 2**64,
            min_tokens=self.min_tokens,
            stop_token_ids=stop_token_ids,
            eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
            ignore_eos=self.ignore_eos,
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            repetition_penalty=min(
                max(float(self.repetition_penalty), _LEAST_REPETITION), _MOST_REPETITION
            ),
            logprobs=-1 if self.logprobs is None else self.logprobs,
        )


def _check_type(name: str, value: object, what: str, types: tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, types):
        raise TypeError(f"{name}={value!r} must be {what}")
