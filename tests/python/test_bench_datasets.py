"""Workloads of the throughput benchmark."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.bench.datasets import (
    Lengths,
    random_lengths,
    random_requests,
    read_trace,
    sample_trace,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_range_ratio_zero_makes_every_length_equal():
    assert random_lengths(1024, 128, 0.0, 3, rng()) == [Lengths(1024, 128)] * 3


@given(
    mean=st.integers(1, 5000),
    ratio=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_lengths_stay_within_the_range(mean, ratio, seed):
    lengths = random_lengths(mean, mean, ratio, 20, rng(seed))
    values = [value for each in lengths for value in (each.input, each.output)]
    assert min(values) >= max(1, np.floor(mean * (1 - ratio)))
    assert max(values) <= np.ceil(mean * (1 + ratio))


def test_random_lengths_reach_both_ends_and_centre_on_the_mean():
    inputs = [lengths.input for lengths in random_lengths(10, 10, 0.5, 5000, rng())]
    assert set(inputs) == set(range(5, 16))
    assert np.mean(inputs) == pytest.approx(10, abs=0.2)


def test_random_lengths_depend_on_the_seed_only():
    assert random_lengths(50, 50, 0.5, 40, rng(7)) == random_lengths(50, 50, 0.5, 40, rng(7))
    assert random_lengths(50, 50, 0.5, 40, rng(7)) != random_lengths(50, 50, 0.5, 40, rng(8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 10, 1.0), r"range ratio is 1.0; it must be in \[0, 1\)"),
        ((10, 10, -0.1), "range ratio is -0.1"),
        ((0, 10, 0.0), "lengths are 0 in, 10 out"),
    ],
)
def test_random_lengths_reject_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_lengths(*arguments, count=1, rng=rng())


def test_random_prompts_hold_no_special_token_and_all_others():
    special = {0, 3, 49}
    requests = random_requests([Lengths(200, 5)] * 10, 50, special, rng())
    tokens = {token for request in requests for token in request.prompt_token_ids}
    assert tokens == set(range(50)) - special
    assert {len(request.prompt_token_ids) for request in requests} == {200}
    assert {request.output_len for request in requests} == {5}


def test_random_prompts_differ_from_each_other():
    first, second = random_requests([Lengths(32, 1)] * 2, 1000, {0}, rng())
    assert first.prompt_token_ids != second.prompt_token_ids


def test_random_prompts_need_a_token():
    with pytest.raises(ValueError, match="all 2 tokens"):
        random_requests([Lengths(1, 1)], 2, {0, 1}, rng())


def write(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "prompt_tokens,output_tokens\n107,15\n396,513\n",
        "input,output\n107,15\n396,513\n",
        "output_len,request_id,input_len\n15,a,107\n513,b,396\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n0.5,107,15\n0.7,396,513\n",
        "107,15\n396,513\n",
        "107,15\n\n396,513\n",
    ],
)
def test_reads_traces_by_column_name(tmp_path, text):
    assert read_trace(write(tmp_path, text)) == [Lengths(107, 15), Lengths(396, 513)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "0 columns of input lengths among a, b; name one of them input_len"),
        ("input,prompt_len,output\n1,2,3\n", "2 columns of input lengths"),
        ("input,b\n1,2\n", "0 columns of output lengths"),
        ("input,output\n1,2\n1,x\n", r"row 3 has lengths \['1', 'x'\]; they must be integers"),
        ("input,output\n1,-2\n", "row 2 has lengths"),
        ("input,output\n1\n", "row 2 has 1 columns"),
    ],
)
def test_rejects_traces_it_cannot_read(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_trace(write(tmp_path, text))


TRACE = [Lengths(i, 1) for i in range(1, 21)]


def test_trace_is_sampled_without_repetition():
    sample = sample_trace(TRACE, 20, 100, rng())
    assert sorted(sample, key=lambda lengths: lengths.input) == TRACE
    assert sample != TRACE


def test_trace_leaves_out_what_does_not_fit():
    trace = [*TRACE, Lengths(0, 5), Lengths(5, 0)]
    sample = sample_trace(trace, 15, 16, rng())
    assert {lengths.input for lengths in sample} == set(range(1, 16))


def test_short_trace_is_repeated():
    sample = sample_trace(TRACE, 45, 100, rng())
    assert sample[:20] == sample[20:40]
    assert sample[40:] == sample[:5]


def test_trace_without_a_usable_request_is_an_error():
    with pytest.raises(ValueError, match="none of 20 requests of the trace fits into 1 tokens"):
        sample_trace(TRACE, 1, 1, rng())
