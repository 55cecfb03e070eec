"""SamplingParams: vLLM's names and defaults, and what each wrong value says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanoflow import RequestOutputKind, SamplingParams


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (
        1,
        1.0,
        1.0,
        0,
        0.0,
    )
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (None, None, False)
    assert params.detokenize and params.skip_special_tokens
    assert params.spaces_between_special_tokens and not params.include_stop_str_in_output
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert (params.logprobs, params.prompt_logprobs) == (None, None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", float("nan"), "temperature=nan must be a number of at least 0"),
        ("temperature", float("inf"), "temperature=inf"),
        ("temperature", -0.1, r"temperature=-0\.1 must be a number of at least 0"),
        ("top_p", 0, "top_p=0 must be above 0 and at most 1"),
        ("top_p", 1.5, r"top_p=1\.5"),
        ("top_p", float("nan"), "top_p=nan"),
        ("top_k", -2, "top_k=-2"),
        ("min_p", 1.1, r"min_p=1\.1 must be from 0 to 1"),
        ("max_tokens", 0, "max_tokens=0 must be at least 1, or None"),
        ("min_tokens", -1, "min_tokens=-1 must be at least 0"),
        ("min_tokens", 17, "min_tokens=17 is above max_tokens=16"),
        ("stop", ["a", ""], "empty string"),
        ("stop_token_ids", [3, -1], r"stop_token_ids=\[3, -1\] holds a negative id"),
        ("n", 0, "n=0 must be at least 1"),
        ("n", 10**6, "n=1000000 must be at least 1, at most 16384"),
        ("truncate_prompt_tokens", 0, "truncate_prompt_tokens=0 must be at least 1, -1 or None"),
        ("truncate_prompt_tokens", -2, "truncate_prompt_tokens=-2"),
        ("presence_penalty", 2.5, r"presence_penalty=2\.5 must be from -2 to 2"),
        ("presence_penalty", float("nan"), "presence_penalty=nan must be from -2 to 2"),
        ("frequency_penalty", -2.1, r"frequency_penalty=-2\.1 must be from -2 to 2"),
        ("repetition_penalty", 0, "repetition_penalty=0 must be a number above 0"),
        ("repetition_penalty", -1.5, r"repetition_penalty=-1\.5"),
        ("repetition_penalty", float("inf"), "repetition_penalty=inf"),
        ("logprobs", 21, "logprobs=21 must be from 0 to 20, or None for none"),
        ("logprobs", -1, "logprobs=-1 must be from 0 to 20"),
        ("prompt_logprobs", 21, "prompt_logprobs=21 must be from 0 to 20, or None for none"),
        ("logit_bias", {3: float("nan")}, "logit_bias of token 3 is nan, not a finite number"),
        ("logit_bias", dict.fromkeys(range(513), 1.0), "logit_bias has 513 tokens, at most 512"),
        ("allowed_token_ids", [], "allowed_token_ids is empty: no token could be sampled"),
        ("bad_words", ["x", " "], "bad_words holds an empty string"),
        ("bad_words", ["\ud800"], r"bad_words holds '\\ud800', which is no valid Unicode text"),
        ("extra_args", {"a": 1}, "extra_args"),
    ],
)
def test_a_wrong_value_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{field: value})
    params = SamplingParams()
    setattr(params, field, value)
    with pytest.raises(ValueError, match=message):
        params.resolve([2], 100, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", True),
        ("n", 1.5),
        ("n", None),
        ("truncate_prompt_tokens", "5"),
        ("spaces_between_special_tokens", 1),
        ("top_k", 1.5),
        ("max_tokens", 2.0),
        ("seed", "x"),
        ("stop", 1),
        ("stop", [1]),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [1.5]),
        ("presence_penalty", "high"),
        ("logprobs", True),
        ("logprobs", 1.0),
        ("prompt_logprobs", "1"),
        ("logit_bias", [3]),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", {3: "high"}),
        ("allowed_token_ids", 3),
        ("allowed_token_ids", ["3"]),
        ("bad_words", "x"),
        ("bad_words", [3]),
        ("structured_outputs", {"json": "{}"}),
        ("ignore_eos", 1),
        ("detokenize", None),
    ],
)
def test_a_value_of_another_type_is_named(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=field):
        SamplingParams(**{field: value})


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_stop_strings_need_the_text() -> None:
    with pytest.raises(ValueError, match="detokenize=True"):
        SamplingParams(stop="x", detokenize=False)


def test_several_samples_are_drawn() -> None:
    with pytest.raises(ValueError, match=r"n=2 must be 1 when sampling is greedy \(temperature=0"):
        SamplingParams(n=2, temperature=0)
    params = SamplingParams(n=2, seed=2**64 - 1)
    assert [params.resolve([], 100, 0, index).seed for index in range(2)] == [2**64 - 1, 0]


def test_temperature_zero_neutralises_the_filters() -> None:
    greedy = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.2).resolve([], 100, 0)
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.min_p) == (0, 1, 0, 0)


def test_penalties_and_logprobs_reach_the_scheduler() -> None:
    neutral = SamplingParams(temperature=0).resolve([], 100, 0)
    assert not neutral.has_penalties and neutral.logprobs == -1
    params = SamplingParams(
        temperature=0,
        presence_penalty=2,
        frequency_penalty=-2,
        repetition_penalty=1e-100,
        logprobs=0,
    )
    sampling = params.resolve([], 100, 0)
    assert sampling.has_penalties and sampling.logprobs == 0
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (2.0, -2.0)
    assert np.float32(sampling.repetition_penalty) > 0
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert SamplingParams(**{name: 0.5}).resolve([], 100, 0).has_penalties


def test_resolving_for_a_model() -> None:
    params = SamplingParams(top_k=-1, stop_token_ids=[5, 5, 6], min_tokens=1)
    sampling = params.resolve([2, 5, 2], vocab_size=100, default_seed=2**64 + 7)
    assert (sampling.top_k, sampling.stop_token_ids, sampling.seed) == (0, (5, 6), 7)
    assert sampling.eos_token_ids == (2, 5)
    assert SamplingParams(top_k=1000).resolve([], 100, 0).top_k == 100
    assert SamplingParams(seed=-1).resolve([], 100, 0).seed == 2**64 - 1
    with pytest.raises(ValueError, match=r"stop_token_ids \[100\] are outside the vocabulary"):
        SamplingParams(stop_token_ids=[99, 100]).resolve([], 100, 0)
    with pytest.raises(ValueError, match="min_tokens=1 with 65 stop"):
        SamplingParams(stop_token_ids=list(range(65)), min_tokens=1).resolve([], 100, 0)
