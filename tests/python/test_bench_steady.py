"""The steady-state window of a throughput run."""

from dataclasses import dataclass

from nanoflow.bench.steady import steady_state


@dataclass
class Step:
    time_done: float
    prefill_tokens: int
    decode_tokens: int
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
    window = steady_state(steps)
    assert window is not None
    assert (window.seconds, window.steps, window.tokens) == (3.0, 2, 120)
    assert window.tokens_per_second == 40.0


def test_requests_may_still_arrive_in_the_first_steps():
    steps = [
        Step(1.0, 1, 0, running=1, waiting=1),
        Step(2.0, 1, 1, running=2, waiting=6),
        Step(3.0, 0, 2, running=1, waiting=6),
        Step(4.0, 1, 2, running=2, waiting=3),
        Step(5.0, 0, 2, running=2, waiting=0),
    ]
    window = steady_state(steps)
    assert window is not None
    assert (window.seconds, window.tokens) == (1.0, 3)


def test_no_steady_state_when_all_run_from_the_start():
    steps = [
        Step(1.0, 100, 0, running=4, waiting=0),
        Step(2.0, 0, 4, running=4, waiting=0),
        Step(3.0, 0, 4, running=0, waiting=0),
    ]
    assert steady_state(steps) is None


def test_no_steady_state_when_the_queue_empties_before_the_first_completion():
    steps = [
        Step(1.0, 100, 0, running=2, waiting=2),
        Step(2.0, 100, 2, running=4, waiting=0),
        Step(3.0, 0, 4, running=2, waiting=0),
    ]
    assert steady_state(steps) is None


def test_no_steady_state_without_steps():
    assert steady_state([]) is None
