"""How the tokens of a request are chosen and when it ends, with vLLM's names and defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Integral, Real
from typing import Any

import numpy as np

from nanoflow.request import Bias, Sampling
from nanoflow.structured import StructuredOutputsParams

MAX_BANNED_TOKENS = 64  # end-of-sequence and stop tokens of a request with min_tokens
MAX_LOGPROBS = 20  # of a token, beside it
MAX_SAMPLES = 16384  # of a prompt, as in vLLM
MAX_BIASES = 512  # of a request
_MOST_BIAS = 100.0  # and least, negative
_LEAST_REPETITION, _MOST_REPETITION = 1e-30, 1e30  # what float32 has room for
_GREEDY_TEMPERATURE = 1e-5  # and below: the logits would overflow


class RequestOutputKind(Enum):
    CUMULATIVE = 0  # every output holds all that has been generated
    DELTA = 1  # every output holds what is new
    FINAL_ONLY = 2  # there is one output, at the end


# Fields that are there for compatibility, with the values that change nothing.
_NOT_YET: dict[str, tuple[Any, ...]] = {
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
    prompt_logprobs: int | None = None  # the same of each token of the prompt but the first
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # no effect: detokenizers here put none there
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None  # the last so many alone; -1: as many as fit
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE  # of AsyncLLM; LLM has the last
    structured_outputs: StructuredOutputsParams | None = None  # what the text must conform to
    # Added to the logits of tokens, before penalties and temperature; from -100 to 100.
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None  # no other token is sampled
    bad_words: list[str] | None = None  # no token is sampled that would complete one
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
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise ValueError(
                    f"{name}={count} must be from 0 to {MAX_LOGPROBS}, or None for none"
                )
        self._check_constraints()
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
        if not 1 <= self.n <= MAX_SAMPLES:
            raise ValueError(f"n={self.n} must be at least 1, at most {MAX_SAMPLES}")
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

    def _check_constraints(self) -> None:
        if len(self.logit_bias or ()) > MAX_BIASES:
            raise ValueError(
                f"logit_bias has {len(self.logit_bias or ())} tokens, at most {MAX_BIASES}"
            )
        for token, value in (self.logit_bias or {}).items():
            if not math.isfinite(value):
                raise ValueError(f"logit_bias of token {token} is {value}, not a finite number")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty: no token could be sampled")
        for word in self.bad_words or ():
            if not word.strip():
                raise ValueError("bad_words holds an empty string")
            if any("\ud800" <= character <= "\udfff" for character in word):
                raise ValueError(f"bad_words holds {word!r}, which is no valid Unicode text")

    def _check_types(self) -> None:
        numbers = ("temperature", "top_p", "min_p")
        penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty")
        for name in numbers + penalties:
            _check_type(name, getattr(self, name), "a number", (Real,))
        for name in ("n", "top_k", "min_tokens"):
            _check_type(name, getattr(self, name), "an integer", (Integral,))
        maybe = ("seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
        for name in maybe:
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
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise TypeError(
                f"structured_outputs={self.structured_outputs!r} must be a StructuredOutputsParams"
            )
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError(f"output_kind={self.output_kind!r} must be a RequestOutputKind")
        for name in ("stop_token_ids", "allowed_token_ids"):
            ids = getattr(self, name)
            if isinstance(ids, str | int):
                raise TypeError(f"{name}={ids!r} must be a list of integers")
            if set(map(type, ids or ())) <= {int}:  # fast, as such lists may be long
                continue
            for token in ids or ():
                _check_type(name, token, "a list of integers", (Integral,))
        if not isinstance(self.logit_bias, Mapping | None):
            raise TypeError(f"logit_bias={self.logit_bias!r} must map token ids to numbers")
        for token, value in (self.logit_bias or {}).items():
            _check_type("logit_bias", token, "a map from integers", (Integral,))
            _check_type("logit_bias", value, "a map to numbers", (Real,))
        if isinstance(self.bad_words, str) or not all(
            isinstance(word, str) for word in self.bad_words or ()
        ):
            raise TypeError(f"bad_words={self.bad_words!r} must be a list of strings")
        if not isinstance(self.stop, str | Sequence | None) or not all(
            isinstance(stop, str) for stop in self.stop_strings
        ):
            raise TypeError(f"stop={self.stop!r} must be a string or a list of strings")

    def resolve(
        self, eos_token_ids: Sequence[int], vocab_size: int, default_seed: int, index: int = 0
    ) -> Sampling:
        """What the scheduler needs, for a model and a sample.

        Raises ValueError on tokens outside the vocabulary, or more stop tokens than min_tokens can
        keep from being sampled.
        """
        self.check()
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            if outside := [t for t in getattr(self, name) or () if not 0 <= t < vocab_size]:
                raise ValueError(f"{name} {outside} are outside the vocabulary of {vocab_size}")
        stop_token_ids = tuple(dict.fromkeys(self.stop_token_ids or ()))
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
            # Once for all samples: the others find the prompt in the KV cache.
            prompt_logprobs=-1 if self.prompt_logprobs is None or index else self.prompt_logprobs,
            bias=self._bias(),
        )

    def _bias(self) -> Bias | None:
        if not self.logit_bias:
            return None
        values = np.fromiter(self.logit_bias.values(), np.float32)
        return Bias(
            tokens=np.fromiter(self.logit_bias, np.int32),
            values=np.clip(values, -_MOST_BIAS, _MOST_BIAS),
        )


def _check_type(name: str, value: object, what: str, types: tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, types):
        raise TypeError(f"{name}={value!r} must be {what}")
