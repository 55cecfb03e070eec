"""Choosing among schedules while serving: pure decisions, then in the scheduler's loop."""

from __future__ import annotations

import logging
from itertools import pairwise
from math import exp

import pytest

from fake_engine import expected_output
from nanoflow.metrics import counted_by, make_metrics
from nanoflow.scheduler import choose
from nanoflow.scheduler.choose import (
    KEEP_SECONDS,
    LATEST_TURNS,
    LIKE_TURNS,
    MEAN_STEPS,
    NEAR,
    SETTLE_SECONDS,
    SETTLE_STEPS,
    TURN_SECONDS,
    TURNS,
    Chooser,
    Mix,
    Option,
)
from nanoflow.scheduler.deal import Dealer
from nanoflow.scheduler.stats import StepStats
from test_loop import VOCAB_SIZE, check_nothing_leaked
from test_loop import serve as serve_loop

FULL, FEW = Mix(1000, 500, 400_000), Mix(16, 16, 10_000)
STEP = 0.05  # seconds


def options(count: int) -> list[Option]:
    return [Option(f"s{i}", f"s{i}", Dealer([], 4)) for i in range(count)]


def predict(number: int, mix: Mix) -> float:
    """The first is best for few rows, by far; with many all are alike but the last."""
    if mix.rows < 100:
        return mix.rows * (1.0 + number)
    return mix.rows * (2.0 if number == 3 else 1.0 + number / 100)


def serve(chooser: Chooser, mix: Mix, speed: dict[int, float], steps: int) -> list[int]:
    chosen = []
    for _ in range(steps):
        number = chooser.choose(mix)
        chosen.append(number)
        chooser.observe(number, mix, STEP * speed[number])
    return chosen


def test_those_near_the_best_are_tried_and_the_fastest_is_kept() -> None:
    chooser = Chooser(options(4), predict)
    speed = {0: 1.0, 1: 0.95, 2: 1.05}
    assert not chooser.is_trying
    chosen = serve(chooser, FULL, speed, 200)
    assert chooser.is_trying
    chosen += serve(chooser, FULL, speed, 300)
    assert not chooser.is_trying
    begins = [i for i, n in enumerate(chosen) if i == 0 or n != chosen[i - 1]]
    assert [chosen[i] for i in begins] == [0, 1, 2] * TURNS + [1]
    for (begin, end), number in zip(pairwise(begins), [0, 1, 2] * TURNS, strict=True):
        steps = (SETTLE_SECONDS + TURN_SECONDS) / (STEP * speed[number])
        assert end - begin == pytest.approx(steps, abs=2)


def test_the_log_tells_what_each_takes_for_the_same_step(caplog: pytest.LogCaptureFixture) -> None:
    """Though they were measured with steps of different sizes."""
    caplog.set_level(logging.INFO, logger=choose.__name__)
    chooser = Chooser(options(2), lambda number, mix: float(mix.rows))
    for step in range(400):
        mix = FULL if step % 3 else Mix(750, 375, 300_000)
        number = chooser.choose(mix)
        chooser.observe(number, mix, mix.rows * (5e-5 if number == 0 else 4e-5))
    assert caplog.messages == [
        "schedule s0 takes 37.50 ms for a step of 750 rows, of which 375 decode",
        "schedule s1 takes 30.00 ms for a step of 750 rows, of which 375 decode",
    ]


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_one_that_is_far_from_the_best_takes_one_turn(slow: int) -> None:
    """Also where it was the first, and nothing was known of the others yet."""
    chooser = Chooser(options(3), lambda number, mix: float(mix.rows))
    speed = {number: 1.0 + number / 100 for number in range(3)} | {slow: 1.02 * NEAR}
    chosen = serve(chooser, FULL, speed, 400)
    begins = [i for i, n in enumerate(chosen) if i == 0 or n != chosen[i - 1]]
    turns = [chosen[i] for i in begins]
    assert turns.count(slow) == 1
    best, second = (number for number in range(3) if number != slow)
    assert turns.count(second) == TURNS
    assert not chooser.is_trying
    assert chosen[-1] == best


def test_few_requests_run_with_the_plan_for_few_at_once() -> None:
    chooser = Chooser(options(4), predict)
    assert set(serve(chooser, FEW, {0: 1.0}, 50)) == {0}
    serve(chooser, FULL, {0: 1.0, 1: 0.9, 2: 0.8}, 400)
    assert chooser.choose(FEW) == 0
    assert chooser.choose(FULL) == 2


def test_trials_with_more_work_are_not_held_against_a_schedule() -> None:
    """Time counts relative to what the same work was predicted to take."""
    chooser = Chooser(options(2), predict)
    for _ in range(200):
        number = chooser.choose(FULL)
        heavier = Mix(1023, 511, 500_000) if number == 1 else Mix(750, 375, 300_000)
        chooser.observe(number, heavier, heavier.rows * (1e-4 if number == 0 else 0.9e-4))
    assert chooser.choose(FULL) == 1


@pytest.mark.parametrize("faster", [0, 1])
def test_what_changes_during_the_trials_is_not_held_against_those_that_come_first(
    faster: int,
) -> None:
    """2 % between them, while all steps become 10 % shorter or longer."""
    for change in (0.1, -0.1):
        chooser = Chooser(options(2), lambda number, mix: float(mix.rows))
        now = 0.0
        for _ in range(300):
            number = chooser.choose(FULL)
            seconds = STEP * (0.98 if number == faster else 1.0) * (1 + change * exp(-now / 1.5))
            now += seconds
            chooser.observe(number, FULL, seconds)
        assert chooser.choose(FULL) == faster


def test_steps_right_after_a_switch_are_not_measured() -> None:
    chooser = Chooser(options(2), predict)
    for _ in range(SETTLE_STEPS):
        chooser.observe(chooser.choose(FULL), FULL, 100.0)  # graphs are captured
    assert serve(chooser, FULL, {0: 1.0, 1: 2.0}, 400)[-1] == 0


@pytest.mark.parametrize("settle_seconds", [0.0, SETTLE_SECONDS])
def test_a_clock_that_follows_late_decides_nothing(
    settle_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is 1 % faster at its own clock, which is not there yet when the other has run."""
    monkeypatch.setattr(choose, "SETTLE_SECONDS", settle_seconds)
    own_clocks, at_own_clock = (1.0, 0.95), (STEP, 1.01 * STEP)
    chooser = Chooser(options(2), lambda number, mix: float(mix.rows))
    clock = 1.0
    for _ in range(600):
        number = chooser.choose(FULL)
        seconds = at_own_clock[number] * own_clocks[number] / clock
        clock += (own_clocks[number] - clock) * (1 - exp(-seconds / 0.6))
        chooser.observe(number, FULL, seconds)
    assert (chooser.choose(FULL) == 0) == (settle_seconds > 0)


def test_a_step_now_and_then_that_captures_a_graph_decides_nothing() -> None:
    chooser = Chooser(options(2), predict)
    for step in range(300):
        number = chooser.choose(FULL)
        slow = 20 if number == 1 and step % 4 == 0 else 1
        chooser.observe(number, FULL, slow * STEP * (1.0 if number == 0 else 0.9))
    assert chooser.choose(FULL) == 1


def test_one_option_is_tried_whatever_is_predicted() -> None:
    def predict(number: int, mix: Mix) -> float:
        return mix.rows * (1 + number / 100 + (number == 6 and mix.rows < 100))

    speed = {**dict.fromkeys(range(6), 1.0), 6: 0.9}
    for mix in (FULL, FEW):
        chooser = Chooser(options(7), predict, always=6)
        chosen = serve(chooser, mix, speed, 600)
        assert set(chosen) == {0, 1, 2, 6}
        assert chosen[-1] == 6


def test_full_steps_are_of_one_kind() -> None:
    """Whether their last rows are taken or not: what is tried in one holds for all of them."""
    chooser = Chooser(options(2), predict)
    for step in range(400):
        mix = Mix(2048 - step % 9, 1024 - step % 5, 780_000 + 1000 * (step % 10))
        number = chooser.choose(mix)
        chooser.observe(number, mix, STEP * (0.9 if number == 1 else 1.0))
        if step * STEP > 2 * TURNS * (SETTLE_SECONDS + TURN_SECONDS + 2 * STEP):
            assert number == 1


def test_a_load_that_grows_after_the_trials_gets_what_is_best_for_it_then() -> None:
    """What was measured corrects predictions, which know how the load has changed."""

    def predict(number: int, mix: Mix) -> float:
        return 1000.0 if number == 0 else 1120.0 - mix.keys / 4096

    def last_of(keys: int) -> set[int]:
        mix = Mix(1024, 512, keys)
        chosen = []
        for _ in range(500):
            chosen.append(chooser.choose(mix))
            taken = predict(chosen[-1], mix) * (1.0 if chosen[-1] == 0 else 1.1)
            chooser.observe(chosen[-1], mix, taken * 5e-5)
        return set(chosen[400:])

    chooser = Chooser(options(2), predict)
    assert last_of(655_360) == {0}  # the other takes 1056, where 960 are predicted
    assert last_of(786_432) == {0}  # 1021
    assert last_of(917_504) == {1}  # 986


@pytest.mark.parametrize("like_turns", [LIKE_TURNS, 1.0])
def test_what_is_best_while_a_load_grows_does_not_last(
    like_turns: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While prompts fill the batch the second takes up to a fifth more than is predicted of it;
    then it takes as much, and is the best. Turns of both count the same without the limit."""
    monkeypatch.setattr(choose, "LIKE_TURNS", like_turns)
    chooser = Chooser(options(2), lambda number, mix: mix.rows * (1.0 - 0.03 * number))
    chosen = []
    for step in range(700):
        part = min(1.0, 0.6 + step / 600)  # of the decodes of a full batch
        mix = Mix(2048, round(1024 * part), round(780_000 * part))
        chosen.append(chooser.choose(mix))
        growing = 0.5 * (1 - part) if chosen[-1] == 1 else 0.0
        seconds = STEP * (1.0 - 0.03 * chosen[-1]) * (1 + growing)
        chooser.observe(chosen[-1], mix, seconds)
    turn = (SETTLE_SECONDS + TURN_SECONDS) / STEP
    assert (set(chosen[round(240 + 2 * (TURNS + 1) * turn) :]) == {1}) == (like_turns < 1)


def test_a_load_that_never_settles_is_tried_nevertheless() -> None:
    chooser = Chooser(options(2), predict)
    turn = round((SETTLE_SECONDS + TURN_SECONDS) / STEP)
    chosen = []
    for step in range(3 * LATEST_TURNS * turn):
        mix = Mix(1000, 500 + 90 * (step // (2 * turn) % 2), 400_000)
        chosen.append(chooser.choose(mix))
        chooser.observe(chosen[-1], mix, STEP * (0.9 if chosen[-1] == 1 else 1.0))
    assert 0 in chosen[2 * TURNS * (turn + 3) :]
    assert set(chosen[2 * LATEST_TURNS * (turn + 3) :]) == {1}


def test_options_that_are_as_good_do_not_take_turns() -> None:
    """What is predicted of them crosses as the load varies."""
    chooser = Chooser(options(2), lambda number, mix: mix.rows + number * (mix.keys / 500 - 800))
    chosen = []
    for step in range(600):
        mix = Mix(1000, 500, 397_000 + 3_000 * (step % 3))
        chosen.append(chooser.choose(mix))
        chooser.observe(chosen[-1], mix, STEP)
    assert len(set(chosen[400:])) == 1
    for keys, better in ((330_000, 1), (470_000, 0)):  # by 14 %
        chosen = [chooser.choose(Mix(1000, 500, keys)) for _ in range(5)]
        assert chosen[-1] == better


def test_turns_are_ended_whatever_is_predicted_meanwhile() -> None:
    """Which three of six stand changes from step to step."""

    def predict(number: int, mix: Mix) -> float:
        return mix.rows * (1 + 0.01 * ((number + mix.keys // 40_000) % 6))

    chooser = Chooser(options(6), predict, always=5)
    chosen = []
    for step in range(1200):
        mix = Mix(1000, 500, 400_000 + 40_000 * (step % 5))
        chosen.append(chooser.choose(mix))
        chooser.observe(chosen[-1], mix, STEP * (0.95 if chosen[-1] == 2 else 1.0))
    ends = [0, *(i for i, (a, b) in enumerate(pairwise(chosen), 1) if a != b)]
    turn = (SETTLE_SECONDS + TURN_SECONDS) / STEP
    short = [b - a for a, b in pairwise(ends) if b - a < turn - 3]  # until another one stands
    assert sum(short) < 15 and len(ends) < 6 * TURNS + 5
    assert set(chosen[-100:]) == {2}


def test_what_begins_to_stand_after_the_trials_is_tried_if_predicted_to_be_the_best() -> None:
    def predict(number: int, mix: Mix) -> float:
        third = 1.3 if mix.keys < 450_000 else 1.02 if mix.keys < 550_000 else 0.98
        return mix.rows * (1.0, 1.05, third)[number]

    chooser = Chooser(options(3), predict)
    speed = {0: 1.0, 1: 1.03, 2: 0.9}
    seen = [set(serve(chooser, Mix(1000, 500, k), speed, 400)) for k in (400_000, 500_000, 600_000)]
    assert seen == [{0, 1}, {0}, {0, 2}]
    assert chooser.choose(Mix(1000, 500, 600_000)) == 2


def test_what_is_better_for_a_step_now_and_then_is_not_switched_to() -> None:
    chooser = Chooser(
        options(2), lambda number, mix: float(mix.rows + 60 * number * (mix.rows > 950))
    )
    mixes = (Mix(1000, 500, 400_000), Mix(900, 500, 400_000), Mix(900, 500, 400_000))
    speed = {0: 1.0, 1: 0.975}  # of what is predicted: in two steps of three the second is better
    chosen = []
    for step in range(900):
        mix = mixes[step % 3]
        chosen.append(chooser.choose(mix))
        took = (mix.rows + 60 * chosen[-1] * (mix.rows > 950)) * speed[chosen[-1]]
        chooser.observe(chosen[-1], mix, took * STEP / 1000)
    assert len(set(chosen[400:])) == 1


def test_a_load_that_varies_is_tried_once() -> None:
    """Prompts come as they come: a third more rows in some steps than in others."""
    chooser = Chooser(options(4), predict)
    chosen = []
    for step in range(500):
        mix = Mix((1536, 1700, 2048)[step % 3], 1010, 480_000)
        chosen.append(chooser.choose(mix))
        chooser.observe(chosen[-1], mix, mix.rows * (0.9e-4 if chosen[-1] == 1 else 1e-4) / 2)
    begins = [n for i, n in enumerate(chosen) if i == 0 or n != chosen[i - 1]]
    assert begins == [0, 1, 2] * TURNS + [1]


def test_loads_that_take_turns_are_tried_side_by_side() -> None:
    chooser = Chooser(options(2), predict)
    other = Mix(300, 300, 200_000)
    last = {}
    for step in range(1000):
        mix, faster = ((FULL, 1), (other, 0))[step // 50 % 2]
        last[mix] = chooser.choose(mix)
        chooser.observe(last[mix], mix, STEP * (0.9 if last[mix] == faster else 1.0))
    assert last == {FULL: 1, other: 0}


def test_a_choice_is_looked_at_again_after_a_while() -> None:
    chooser = Chooser(options(2), predict)
    serve(chooser, FULL, {0: 1.0, 1: 0.9}, 400)
    assert chooser.choose(FULL) == 1
    serve(chooser, FULL, {0: 0.8, 1: 1.0}, round(KEEP_SECONDS / STEP) + 500)
    assert chooser.choose(FULL) == 0


def test_what_was_fast_by_chance_is_found_out() -> None:
    """The second takes 5 % less than it should in the trials, and 3 % more than the first later: as
    soon as there are more turns that say so, and then some steps."""
    chooser = Chooser(options(2), predict)
    serve(chooser, FULL, {0: 1.0, 1: 0.98}, 280)
    assert not chooser.is_trying and chooser.choose(FULL) == 1
    chosen = serve(chooser, FULL, {0: 1.0, 1: 1.03}, round(0.3 * KEEP_SECONDS / STEP))
    assert chosen[-1] == 0 and not chooser.is_trying
    assert chosen.index(0) * STEP < (TURNS + 1) * TURN_SECONDS + 2 * MEAN_STEPS * STEP
    assert sum(a != b for a, b in pairwise(chosen)) == 1


def test_one_option_is_the_choice() -> None:
    assert set(serve(Chooser(options(1), predict), FULL, {0: 1.0}, 20)) == {0}


class Restless(Chooser):
    """Another option every step."""

    def __init__(self) -> None:
        cuts: list[list[float]] = [[], [0.5], [0.25, 0.5, 0.75]]
        made = [Option(f"{len(c)}", len(c) + 1, Dealer(c, 6)) for c in cuts]
        super().__init__(made, predict)
        self.seen: list[tuple[int, Mix, float]] = []
        self.steps = 0

    def choose(self, mix: Mix) -> int:
        self.steps += 1
        self.is_trying = self.steps % 2 == 0
        return self.steps % len(self.options)

    def observe(self, number: int, mix: Mix, seconds: float) -> None:
        self.seen.append((number, mix, seconds))


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_requests_do_not_notice_that_schedules_change(steps_in_flight: int) -> None:
    chooser = Restless()
    heard: list[StepStats] = []
    service = serve_loop(
        steps_in_flight=steps_in_flight, chooser=chooser, step_listener=heard.append
    )
    requests = [service.request(i, prompt_len=3 + i) for i in range(12)]
    service.loop.submit(requests)
    for name, request in service.wait(len(requests)).items():
        tokens, reason, _ = expected_output(requests[int(name)], VOCAB_SIZE)
        assert (request.output_token_ids, request.finish_reason) == (tokens, reason)
    trials = [stats.is_trial for stats in heard]
    assert trials == [i % 2 == 1 for i in range(len(trials))]
    segments = {len(batch.segment_requests) - 1 for batch in service.engine.batches}
    assert segments == {1, 2, 4}
    check_nothing_leaked(service)
    counted = counted_by("schedule", "nanoflow:steps", make_metrics(service.state.stats(), "tiny"))
    assert set(counted) == {"0", "1", "3"} and min(counted.values()) > 0
    assert sum(counted.values()) == len(service.engine.batches)
    # What is measured is a step that waited for the one before it.
    assert (len(chooser.seen) > 0) == (steps_in_flight == 2)
    for number, mix, seconds in chooser.seen:
        assert 0 <= number < 3 and seconds >= 0
        assert 0 < mix.rows <= 16 and 0 <= mix.decodes <= mix.rows <= mix.keys
