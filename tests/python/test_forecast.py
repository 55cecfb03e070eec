"""Admission by the predicted peak of the KV cache."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.scheduler.forecast import PRIOR_TOKENS, WINDOW, Forecast, Outlook
from test_policy import Setup, request


@given(
    requests=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 300)), max_size=40),
    page_size=st.sampled_from([1, 16, 64]),
)
def test_the_peak_is_that_of_running_it_through(
    requests: list[tuple[int, int]], page_size: int
) -> None:
    table = np.array(requests, np.int64).reshape(-1, 2)
    outlook = Outlook(page_size, table[:0, 0], table[:0, 1])
    for stored, left in requests:
        outlook.add(stored, left)
    peak = 0
    for step in range(int(table[:, 1].max(initial=0)) + 1):
        there = table[table[:, 1] >= step]
        peak = max(peak, int(np.sum(-(-(there[:, 0] + step) // page_size))))
    assert abs(outlook.peak() - peak) <= len(requests) / 2 + 1, "half a page each is the guess"


def test_lengths_that_are_certain_never_preempt_and_fill_the_cache() -> None:
    setup = Setup(num_slots=32, page_size=4, num_pages=64, max_model_len=80, max_rows=64)
    items = [request(n, 8 + n % 5, 60 + n % 20, ignore_eos=True) for n in range(40)]
    setup.add(*items)
    held = []
    while setup.state.has_requests:
        assert not setup.turn().preempted
        if setup.state.num_waiting:
            held.append(setup.num_pages - setup.state.pages.num_free)
    setup.finish()
    assert max(held) > 0.85 * setup.num_pages, "it admits too few"


def test_a_request_that_would_run_alone_is_always_admitted() -> None:
    setup = Setup(num_slots=4, page_size=4, num_pages=10, max_model_len=40)
    setup.add(request(0, 8, 40, ignore_eos=True), request(1, 8, 40, ignore_eos=True))
    assert [item.id for _, item in setup.turn().admitted] == ["0"]
    setup.finish()


def steps_left(forecast: Forecast, generated: int, max_tokens: int = 10_000) -> int:
    item = request(0, 5, 5 + max_tokens)
    item.output_token_ids = [1] * generated
    return forecast.steps_left(item)


def test_lengths_are_expected_as_those_that_ended_were() -> None:
    forecast = Forecast()
    assert steps_left(forecast, 0) == PRIOR_TOKENS
    for generated in [10] * (WINDOW // 2) + [100] * (WINDOW // 2):
        forecast.observe(generated)
    assert steps_left(forecast, 0) == 55
    assert steps_left(forecast, 10) == 90, "only those that had more count"
    assert steps_left(forecast, 200) == 200, "it has outlived all"
    assert steps_left(forecast, 0, max_tokens=30) == 30
    certain = request(0, 5, 505, ignore_eos=True)
    assert forecast.steps_left(certain) == 500


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_wrong_guesses_cost_preemptions_but_nothing_else(seed: int) -> None:
    setup = Setup(num_slots=16, page_size=4, num_pages=30, max_model_len=100, max_rows=40)
    for _ in range(WINDOW):
        setup.state.admission.forecast.observe(1)  # so it expects next to nothing
    rng = np.random.default_rng(seed)
    items = [request(n, int(rng.integers(1, 20)), 100) for n in range(12)]
    setup.add(*items)
    setup.finish()
    assert all(item.finish_reason in ("stop", "length") for item in items)


def test_outlook_counts_running_requests_as_prefilled() -> None:
    setup = Setup(num_slots=4, page_size=4, num_pages=100, max_rows=4)
    setup.add(request(0, 16, 20, ignore_eos=True))
    setup.turn()
    slots = setup.state.slots
    outlook = Forecast().outlook(slots, slots.running)
    assert outlook.peak() == pytest.approx((16 + 4 + 2) // 4)
