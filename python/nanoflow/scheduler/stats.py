"""What the scheduler counts, for metrics."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from nanoflow.request import FinishReason

# Upper bounds of StepTimes.counts, in seconds; the last count has none.
STEP_TIME_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)


@dataclass(slots=True)
class StepTimes:
    """Time of the scheduler's own work on steps, waits left out."""

    seconds: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * (len(STEP_TIME_BOUNDS) + 1))

    def add(self, seconds: float) -> None:
        self.seconds += seconds
        self.counts[bisect_left(STEP_TIME_BOUNDS, seconds)] += 1


@dataclass(slots=True)
class Counters:
    """Since the start. The scheduler's thread alone counts; any thread may read."""

    prompt_tokens: int = 0  # of requests that have generated a token
    generation_tokens: int = 0
    prefix_queries: int = 0  # tokens of requests whose beginning was looked for
    prefix_hits: int = 0  # of them, found in the KV cache
    preemptions: int = 0
    finished: dict[FinishReason, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0}
    )
    step_times: StepTimes = field(default_factory=StepTimes)

    def snapshot(self, running: int, waiting: int, kv_cache_usage: float) -> SchedulerStats:
        return SchedulerStats(
            running=running,
            waiting=waiting,
            kv_cache_usage=kv_cache_usage,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            preemptions=self.preemptions,
            finished=tuple(self.finished.items()),
            step_seconds=self.step_times.seconds,
            step_counts=tuple(self.step_times.counts),
        )


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counters at a moment, and what there is then."""

    running: int
    waiting: int
    kv_cache_usage: float  # share of the pages that requests or steps in flight hold
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    finished: tuple[tuple[FinishReason, int], ...]
    step_seconds: float
    step_counts: tuple[int, ...]  # by STEP_TIME_BOUNDS
