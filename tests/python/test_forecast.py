"""Admission by the predicted peak of the KV cache."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import admission
from nanoflow.request import Request
from nanoflow.scheduler import admission as pacing
from nanoflow.scheduler.forecast import COHORT, PRIOR_TOKENS, Fate, Forecast, Outlook
from nanoflow.scheduler.slots import Slots
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


SIZES: dict[str, Any] = {
    "num_prompts": 2000,
    "kv_tokens": 464_896,
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 2048,
    "order": "fcfs",
    "cuts": [0.5],
}


def ended(forecast: Forecast, generated: int, fate: Fate = Fate.ENDED) -> None:
    item = request(0, 5, 100_000)
    item.number = forecast.begin()
    item.output_token_ids = [1] * generated
    forecast.end(item, fate)


def slots_with(forecast: Forecast, *generated: int) -> Slots:
    """Running requests that have got so far."""
    slots = Slots(max(1, len(generated)), 20_000, 16)
    for slot, count in enumerate(generated):
        item = request(slot, 5, 20_000)
        item.number = forecast.begin()
        slots.assign(slot, item, slot)
        slots.computed[slot] = 5 + count
    return slots


def steps_left(forecast: Forecast, generated: int, max_tokens: int = 10_000) -> int:
    item = request(0, 5, 5 + max_tokens)
    item.output_token_ids = [1] * generated
    return forecast.steps_left(item)


def mean_of_longer(lengths: list[int], open_: list[int], generated: int) -> float:
    """Kaplan and Meier's estimate, written down from its definition: who gets past a length is the
    share of those at risk there that did not end, times who gets to it."""
    beyond = max(PRIOR_TOKENS, 2 * max([*lengths, *open_], default=0))
    alive, mean, at_generated = 1.0, 0.0, 0.0
    for length in sorted(set(lengths)):
        if length > generated:
            at_generated = at_generated or alive
        at_risk = sum(other >= length for other in [*lengths, *open_]) + 1
        dies = alive * lengths.count(length) / at_risk
        mean += dies * length * (length > generated)
        alive -= dies
    return (mean + alive * beyond) / (at_generated or alive)


tokens = st.lists(st.integers(1, 2000), max_size=30)


@given(lengths=tokens, cut=tokens, running=tokens, generated=st.integers(0, 2500))
def test_lengths_are_expected_as_those_before_were(
    lengths: list[int], cut: list[int], running: list[int], generated: int
) -> None:
    forecast = Forecast()
    for length in lengths:
        ended(forecast, length)
    for length in cut:
        ended(forecast, length, Fate.CUT)
    forecast.refresh(slots_with(forecast, *running))
    mean = mean_of_longer(lengths, cut + running, generated)
    expected = max(mean, generated + 1) - generated
    assert steps_left(forecast, generated) == pytest.approx(expected, abs=1.001)


def test_a_request_is_expected_to_keep_its_own_limits() -> None:
    forecast = Forecast()
    assert steps_left(forecast, 0) == PRIOR_TOKENS
    assert steps_left(forecast, 0, max_tokens=30) == 30
    assert steps_left(forecast, 2000) == 1, "the next token at least"
    certain = request(0, 5, 505, ignore_eos=True)
    assert forecast.steps_left(certain) == 500


def test_requests_of_long_ago_tell_nothing() -> None:
    forecast = Forecast()
    late = request(0, 5, 10_000)
    late.number = forecast.begin()
    for _ in range(COHORT):
        ended(forecast, 1500)
    for _ in range(COHORT):
        ended(forecast, 100)
    late.output_token_ids = [1] * 9000
    forecast.end(late, Fate.ENDED)
    forecast.refresh(slots_with(forecast))
    assert steps_left(forecast, 0) == pytest.approx(100, abs=2)


def test_running_requests_end_at_all_lengths_that_others_had() -> None:
    """So that the peak is that of a likely future: of means, all would end together."""
    forecast = Forecast()
    for length in np.random.default_rng(0).permutation(np.arange(1, 1001)).tolist():
        ended(forecast, length)
    forecast.refresh(slots_with(forecast))
    slots = slots_with(forecast, *[500] * 400)
    forecast.draw(slots, slots.running)
    outlook = forecast.outlook(slots, slots.running)
    left = np.sort(outlook._left)
    assert left[:-1] == pytest.approx(np.linspace(0, 500, 399), abs=15)
    assert left[-1] == 1500, "one is that which outlives all"
    forecast.draw(slots, slots.running)
    again = forecast.outlook(slots, slots.running)
    assert np.array_equal(again._left, outlook._left)


@pytest.mark.parametrize("workload", ["512/512", "512/512:eos", "512/1024", "512/1024:eos"])
def test_a_full_cache_stays_full_and_hardly_preempts(workload: str) -> None:
    """Simulated with the sizes of an H100; see bench/admission.py for more."""
    row = admission.measure(workload, argparse.Namespace(**SIZES))
    assert row.preempted < 0.005
    assert row.steady_pages_granted > 0.95


def test_more_is_kept_back_the_fewer_lengths_are_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some thirty of them, whose sum strays by more than that of a thousand."""
    few = argparse.Namespace(**SIZES | {"num_prompts": 300, "kv_tokens": 16_384})
    row = admission.measure("chat", few)
    monkeypatch.setattr(pacing, "SPREAD", 0.0)
    none_kept_back = admission.measure("chat", few)
    assert row.preempted < 0.6 * none_kept_back.preempted
    assert row.total_tokens_per_second > 0.97 * none_kept_back.total_tokens_per_second


def test_last_pages_of_few_requests_are_kept_back() -> None:
    """Each ends with two tokens in a page of its own, a fourth of all that it holds."""
    few = argparse.Namespace(**SIZES | {"num_prompts": 200, "kv_tokens": 3840})
    row = admission.measure("64/130", few)
    assert row.preempted < 0.05 and row.steady_pages_granted > 0.85


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_wrong_guesses_cost_preemptions_but_nothing_else(seed: int) -> None:
    setup = Setup(num_slots=16, page_size=4, num_pages=30, max_model_len=100, max_rows=40)
    for _ in range(99):
        ended(setup.state.admission.forecast, 1)  # so it expects next to nothing
    rng = np.random.default_rng(seed)
    items: list[Request] = [request(n, int(rng.integers(1, 20)), 100) for n in range(12)]
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
