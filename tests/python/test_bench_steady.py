"""The steady-state window of a throughput run, and the fill that brings it about at once."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from nanoflow.bench.datasets import Lengths
from nanoflow.bench.fill import fill_lengths, running_requests
from nanoflow.bench.steady import SteadyState, long_run_rates, steady_state, together, window
from nanoflow.bench.steady_run import CHOSEN_SECONDS, trials_are_over
from nanoflow.config import EngineLimits
from nanoflow.scheduler.stats import StepStats


@dataclass
class Step:
    time_done: float
    prefill_tokens: int
    output_tokens: int
    running: int
    waiting: int


def test_window_lies_between_the_first_completion_and_the_last_admission():
    steps = [
        Step(1.0, 100, 0, running=2, waiting=3),
        Step(2.0, 50, 10, running=3, waiting=2),
        Step(4.0, 0, 20, running=2, waiting=2),  # the first request has ended: 4 of 5 are open
        Step(5.0, 30, 20, running=3, waiting=1),
        Step(7.0, 40, 30, running=2, waiting=1),  # one still waits
        Step(8.0, 50, 10, running=3, waiting=0),
        Step(9.0, 0, 10, running=1, waiting=0),
    ]
    assert steady_state(steps, 60, 40) == SteadyState(3.0, 2, 70, 50, 60, 40)


def test_requests_may_still_arrive_in_the_first_steps():
    steps = [
        Step(1.0, 1, 0, running=1, waiting=1),
        Step(2.0, 1, 1, running=2, waiting=6),
        Step(3.0, 0, 2, running=1, waiting=6),
        Step(4.0, 1, 2, running=2, waiting=3),
        Step(5.0, 0, 2, running=2, waiting=0),
    ]
    found = steady_state(steps, 1, 1)
    assert found is not None
    assert (found.seconds, found.prompt_tokens, found.output_tokens) == (1.0, 1, 2)


def test_no_steady_state_when_all_run_from_the_start():
    steps = [
        Step(1.0, 100, 0, running=4, waiting=0),
        Step(2.0, 0, 4, running=4, waiting=0),
        Step(3.0, 0, 4, running=0, waiting=0),
    ]
    assert steady_state(steps, 25, 2) is None


def test_no_steady_state_when_the_queue_empties_before_the_first_completion():
    steps = [
        Step(1.0, 100, 0, running=2, waiting=2),
        Step(2.0, 100, 2, running=4, waiting=0),
        Step(3.0, 0, 4, running=2, waiting=0),
    ]
    assert steady_state(steps, 50, 2) is None


def test_no_steady_state_without_steps_or_tokens():
    assert steady_state([], 1, 1) is None
    assert window([Step(1.0, 9, 1, 1, 1), Step(2.0, 9, 0, 1, 1)], 0, 1, 9, 1) is None


@pytest.mark.parametrize(
    ("prompt", "output", "rate"),
    [
        (100, 50, 75),  # the long run's mix: both rates agree
        (150, 50, 75),  # more prompts than their share count for nothing
        (40, 50, 45),  # fewer count as they are
    ],
)
def test_the_lower_rate_counts(prompt, output, rate):
    state = SteadyState(2.0, 4, prompt, output, mean_input=200, mean_output=100)
    assert state.tokens_per_second == rate
    assert state.step_ms == 500
    told = state.to_json()
    assert told["prompt_per_output"] == prompt / output
    assert told["prompt_per_output_in_the_long_run"] == 2


def test_windows_count_together_by_what_they_hold():
    parts = [SteadyState(2.0, 4, 100, 50, 200, 100), SteadyState(1.0, 3, 20, 30, 200, 100)]
    assert together(parts) == SteadyState(3.0, 7, 120, 80, 200, 100)


LIMITS = EngineLimits(
    max_num_batched_tokens=2048, max_num_seqs=512, max_model_len=1100, page_size=64, num_pages=7348
)


def test_rates_are_compared_as_if_all_had_the_mix_of_the_long_run():
    """The second schedule is 2 % faster, and had fewer prompts, which cost 0.6 of an output."""

    def took(outputs, prompts, k):
        seconds = k * (outputs + 0.6 * prompts)
        return SteadyState(seconds, 50, prompts, outputs, mean_input=80.0, mean_output=100.0)

    windows = {
        "first": [took(1000, 900, 1e-3), took(990, 700, 1e-3), took(1010, 800, 1e-3)],
        "second": [took(1000, 500, 0.98e-3), took(1020, 600, 0.98e-3)],
    }
    assert together(windows["second"]).counted_per_second < 1000 * 1.8 / 1.48
    rates = long_run_rates(windows)
    assert rates["first"] == pytest.approx(1000 * 1.8 / 1.48, rel=1e-3)
    assert rates["second"] / rates["first"] == pytest.approx(1 / 0.98, rel=1e-3)


def test_one_window_each_tells_no_long_run():
    state = SteadyState(1.0, 5, 80, 100, mean_input=80.0, mean_output=100.0)
    assert long_run_rates({"first": [state], "second": [state]}) == {}
    assert long_run_rates({"first": [], "second": []}) == long_run_rates({}) == {}


def test_as_many_run_as_have_slots_or_pages():
    assert running_requests([Lengths(512, 512)], LIMITS) == 512
    # 512 + 1024 / 2 tokens and half a page each, of 470,272
    assert running_requests([Lengths(512, 1024)], LIMITS) == 445
    assert running_requests([Lengths(10**7, 10)], LIMITS) == 1


def play(fill: list[Lengths], limits: EngineLimits, is_paced: bool) -> tuple[int, list[int]]:
    """Steps until the fill is prefilled, and the tokens each has yet to generate then. With a pace,
    every step lets in as many as would keep all slots busy for one step."""
    to_prefill = [request.input for request in fill]
    left = [request.output for request in fill]
    steps = begun = 0
    credit = 0.0
    while any(to_prefill):
        credit = min(credit, 1) + 1
        while begun < len(fill) and (credit > 0 or not is_paced):
            credit -= fill[begun].output / limits.max_num_seqs
            begun += 1
        rows = limits.max_num_batched_tokens
        for i in range(begun):
            if to_prefill[i] == 0 and left[i] > 0:
                left[i] -= 1
                rows -= 1
        for i in range(begun):
            taken = min(rows, to_prefill[i])
            to_prefill[i] -= taken
            rows -= taken
        steps += 1
    return steps, left


@pytest.mark.parametrize("is_paced", [True, False])
@pytest.mark.parametrize("rows", [1100, 1400, 2048])
def test_when_the_fill_is_prefilled_progress_is_spread_evenly(rows, is_paced):
    """There is a pace where pages are what is short."""
    rng = np.random.default_rng(0)
    limits = replace(LIMITS, max_num_batched_tokens=rows)
    if not is_paced:
        limits = replace(limits, num_pages=2 * LIMITS.num_pages)
    fill = fill_lengths([Lengths(512, 512)], 512, limits, rng)
    assert all(request.input + request.output == 1024 for request in fill)
    steps, left = play(fill, limits, is_paced)
    assert steps >= 0.95 * max(256 if is_paced else 0, 512 * 768 / rows)
    assert np.abs(np.sort(left) - np.arange(512)).max() < 16


def test_long_outputs_are_filled_in_in_proportion_to_their_stay():
    rng = np.random.default_rng(0)
    fill = fill_lengths([Lengths(10, 30), Lengths(10, 90)], 400, LIMITS, rng)
    total = [request.input + request.output - 10 for request in fill]
    assert set(total) == {30, 90}
    assert total.count(90) == pytest.approx(300, abs=30)
    assert all(request.output >= 1 for request in fill)


def test_requests_that_end_during_the_fill_begin_anew():
    rng = np.random.default_rng(0)
    fill = fill_lengths([Lengths(1000, 4)], 100, replace(LIMITS, max_num_batched_tokens=128), rng)
    assert fill[0] == Lengths(1000, 4)


@pytest.mark.parametrize(
    ("trials", "steps"),
    [
        ([True] * 6 + [False] * 9, 6 + 2),
        ([False, True] * 3 + [False] * 9, 6 + 2),
        ([False, False, False, True], 3),
        ([True, False] * 9, None),
        ([], None),
    ],
)
def test_trials_are_over_when_none_is_seen_for_a_while(trials, steps):
    log = [
        StepStats(i, 7 + i * CHOSEN_SECONDS / 2, 8, 8, 8, 8, 8, 8, 0.001, is_trial)
        for i, is_trial in enumerate(trials)
    ]
    over = [count for count in range(len(log) + 1) if trials_are_over(log[:count])]
    assert (over[0] if over else None) == steps
