"""The steady state of a throughput run, from the log of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

DEFINITION = (
    "tokens processed (prompt and decode rows) a second between two steps: the one at whose end "
    "the first request had completed, and the last one that left requests waiting"
)


class Step(Protocol):
    """What the steady state needs of a completed step."""

    @property
    def time_done(self) -> float: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def decode_tokens(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SteadyState:
    """The window without ramp-up (no request has ended yet) and tail (none is left to admit)."""

    seconds: float
    steps: int
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def steady_state(steps: Sequence[Step]) -> SteadyState | None:
    """None when the run has no such window: all requests were running before the first ended.

    Requests may still arrive during the first steps, so the first completion is the first fall of
    the number of open requests from its peak.
    """
    if not steps:
        return None
    unfinished = [step.running + step.waiting for step in steps]
    peak = max(unfinished)
    first_at_peak = unfinished.index(peak)
    begin = next((i for i, n in enumerate(unfinished) if i > first_at_peak and n < peak), None)
    end = max((i for i, step in enumerate(steps) if step.waiting), default=-1)
    if begin is None or end <= begin:
        return None
    window = steps[begin + 1 : end + 1]
    seconds = steps[end].time_done - steps[begin].time_done
    if seconds <= 0:
        return None
    tokens = sum(step.prefill_tokens + step.decode_tokens for step in window)
    return SteadyState(seconds, len(window), tokens)
