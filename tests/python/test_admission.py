"""How fast requests begin while many wait."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nanoflow.scheduler import admission, even
from nanoflow.scheduler.admission import Admission
from nanoflow.scheduler.forecast import Fate
from nanoflow.scheduler.slots import Slots
from nanoflow.scheduler.waiting import WaitingQueue
from test_policy import Setup, request


def pages_held(count: int) -> tuple[float, int]:
    """Share of the pages that equal requests hold from the end of the first life on, while some
    wait, and how many were preempted."""
    setup = Setup(num_slots=64, page_size=4, num_pages=200, max_model_len=64, max_rows=64)
    setup.add(*(request(n, 16, 60, ignore_eos=True) for n in range(count)))
    held, preempted = [], 0
    while setup.state.has_requests:
        preempted += len(setup.turn().preempted)
        if setup.state.num_waiting and setup.state.counters.finished["length"]:
            held.append(1 - setup.state.pages.num_free / setup.num_pages)
    setup.finish()
    return float(np.mean(held)), preempted


def test_equal_requests_given_at_once_fill_the_cache_in_a_steady_flow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paced, preempted = pages_held(120)
    monkeypatch.setattr(admission, "LONG_QUEUE", float("inf"))
    in_phase, _ = pages_held(120)
    assert preempted == 0
    assert paced > 0.8 > 0.7 > in_phase


def offered(pace: Admission, waiting: WaitingQueue, running: int) -> list[str]:
    return [item.id for item in pace.offer(waiting, running)]


def queue(count: int) -> WaitingQueue:
    waiting = WaitingQueue()
    for number in range(count):
        waiting.add(request(number, 16, 60, ignore_eos=True))
    return waiting


def test_all_are_offered_while_the_queue_is_short() -> None:
    pace = Admission(num_pages=75, num_slots=64, page_size=4)  # five at their ends
    waiting = queue(12)
    assert offered(pace, waiting, running=3) == [str(n) for n in range(12)]
    waiting.add(request(12, 16, 60, ignore_eos=True))
    assert len(offered(pace, waiting, running=3)) < 13


def test_as_many_begin_as_a_full_cache_serves() -> None:
    pace = Admission(num_pages=75, num_slots=64, page_size=4)
    waiting = queue(1000)
    begun = 0
    for _ in range(500):
        for item in list(pace.offer(waiting, running=3)):
            waiting.pop(item.id)
            pace.charge(item)
            begun += 1
    tokens_times_steps = 44 * (16 + 44 / 2 + 2)
    assert begun == pytest.approx(500 * 75 * 4 / tokens_times_steps, rel=0.05)


def test_prompts_are_prefilled_at_the_pace_they_begin_at() -> None:
    pace = Admission(num_pages=75, num_slots=64, page_size=4)  # five at their ends
    waiting = queue(30)
    assert pace.pace == math.inf  # nobody has begun
    while len(waiting) > 12:
        for item in list(pace.offer(waiting, running=3)):
            waiting.pop(item.id)
            pace.charge(item)
    steps = 44 * (16 + 44 / 2 + 2) / (75 * 4)  # of a full cache, that each takes
    assert pace.pace == pytest.approx(16 / steps)


def test_prefill_rows_of_a_step() -> None:
    def rows(decodes: int, left: int, pace: float, segments: int = 1) -> int:
        return even.prefill_rows(decodes, left, pace, segments)

    assert rows(900, 0, math.inf) > 10**9
    assert rows(100, 0, 50.0) > 10**9  # few decodes
    assert rows(300, 0, 20.0) == 22  # a tenth more; 256 or 512 in all are far
    assert rows(860, 100, 430.0) == rows(860, 100, 430.0, 2) == 1280 - 860
    assert rows(430, 0, 50.0) == 512 - 430
    assert rows(430, 0, 50.0, 2) == 55  # to be shared by segments
    assert rows(256, 8000, 430.0) == 2304 - 256  # what has begun ends soon
    assert rows(1020, 0, 30.0) == 33  # not the 4 up to the next tile


def steps_of_steady_flow(count: int, waiting: range) -> tuple[list[int], int]:
    """Rows of the steps while so many wait, and how many steps all take."""
    setup = Setup(num_slots=64, page_size=4, num_pages=900, max_model_len=64, max_rows=128)
    setup.add(*(request(n, 16, 60, ignore_eos=True) for n in range(count)))
    rows, steps = [], 0
    while setup.state.has_requests:
        plan = setup.turn()
        steps += 1
        if setup.state.num_waiting in waiting:
            rows.append(int(plan.rows.sum()))
    setup.finish()
    return rows, steps


@pytest.mark.parametrize("waiting", [range(200, 400), range(20, 140)])
def test_steps_of_a_steady_flow_are_even(waiting: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 decodes and 1.45 prompts of 16 rows a step, which are 87 rows: 88 in tiles of 8. Also
    while the queue is short, and all begin that fit."""
    monkeypatch.setattr(even, "TILE_ROWS", 8)
    monkeypatch.setattr(even, "FEW_DECODES", 16)
    rows, steps = steps_of_steady_flow(600, waiting)
    monkeypatch.setattr(Admission, "pace", math.inf)
    uneven, steps_before = steps_of_steady_flow(600, waiting)
    assert max(rows) == max(set(rows), key=rows.count) == 88 < max(uneven)
    assert np.std(rows) < 0.6 * np.std(uneven)
    assert np.mean(rows) == pytest.approx(np.mean(uneven), rel=0.04)
    assert steps <= 1.03 * steps_before


def test_segments_of_a_steady_flow_are_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a prompt is longer than all rows that decode, and one begins a step."""
    monkeypatch.setattr(even, "FEW_DECODES", 32)
    setup = Setup(
        num_slots=64, page_size=16, num_pages=900, max_model_len=192, max_rows=512, cuts=(0.5,)
    )
    setup.add(*(request(n, 128, 192, ignore_eos=True) for n in range(400)))
    longest = []
    while setup.state.num_waiting > 170:
        plan = setup.turn()
        if setup.state.counters.finished["length"]:
            starts = np.append(0, np.cumsum(plan.rows))
            rows = np.diff(starts[plan.segment_requests])
            longest.append(rows.max() / rows.mean())
    assert np.mean(longest) < 1.15
    setup.finish()


def test_nobody_is_held_back_where_pages_abound() -> None:
    """Slots are what there is too little of, and bound how many run."""
    pace = Admission(num_pages=10_000, num_slots=4, page_size=4)
    assert len(offered(pace, queue(1000), running=3)) == 1000


def test_one_is_offered_when_none_runs_whatever_it_costs() -> None:
    pace = Admission(num_pages=15, num_slots=64, page_size=4)
    waiting = queue(100)
    for _ in range(3):
        for item in list(pace.offer(waiting, running=1)):
            waiting.pop(item.id)
            pace.charge(item)
    assert offered(pace, waiting, running=1) == []
    assert offered(pace, waiting, running=0)[:1] == [next(iter(waiting)).id]


def test_no_more_is_owed_than_is_known_of_lengths() -> None:
    """Requests that begin before anything is known are charged for a thousand tokens each."""
    pace = Admission(num_pages=500, num_slots=64, page_size=4)
    waiting = WaitingQueue()
    for number in range(1000):
        waiting.add(request(number, 16, 2000))
    for item in list(pace.offer(waiting, running=0))[:4]:
        waiting.pop(item.id)
        pace.charge(item)
    assert offered(pace, waiting, running=4) == []
    for _ in range(200):
        ended = request(0, 16, 2000)
        ended.number = pace.forecast.begin()
        ended.output_token_ids = [1] * 10
        pace.forecast.end(ended, Fate.ENDED)
    pace.forecast.refresh(Slots(1, 2000, 4))
    steps = 0
    while not offered(pace, waiting, running=4):
        steps += 1
    assert steps <= 10, "more than the life of one"


def test_the_forecast_is_held_against_what_came() -> None:
    setup = Setup(num_pages=200)
    setup.add(*(request(n, 8, 20 + n, ignore_eos=True) for n in range(4)))
    setup.add(request(4, 8, 20))
    setup.finish()
    counted = setup.state.stats().forecast
    exact = sum(12 + n for n in range(4))
    assert counted.actual >= exact
    assert counted.expected - exact <= 12, "one request's length was a guess"
    assert counted.error == abs(counted.expected - counted.actual)
