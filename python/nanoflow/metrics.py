"""Metrics with vLLM's names, under `nanoflow:`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter

from nanoflow.scheduler.stats import STEP_TIME_BOUNDS, SchedulerStats

logger = logging.getLogger(__name__)

STATUS_SECONDS = 10.0  # between status lines, as in vLLM


@dataclass(frozen=True, slots=True)
class Metric:
    """A value with a name and labels."""

    name: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """Only grows."""

    value: int


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    """Goes up and down."""

    value: float


@dataclass(frozen=True, slots=True)
class Histogram(Metric):
    """`buckets`: how many observations were at most the bound that is their key."""

    count: int
    sum: float
    buckets: Mapping[str, int]


def make_metrics(stats: SchedulerStats, model_name: str) -> list[Metric]:
    """All metrics of an engine."""
    labels = {"model_name": model_name, "engine": "0"}
    gauges = {
        "num_requests_running": stats.running,
        "num_requests_waiting": stats.waiting,
        "kv_cache_usage_perc": stats.kv_cache_usage,  # from 0 to 1, whatever its name says
    }
    counters = {
        "num_preemptions": stats.preemptions,
        "prompt_tokens": stats.prompt_tokens,
        "prompt_tokens_cached": stats.prefix_hits,
        "generation_tokens": stats.generation_tokens,
        "prefix_cache_queries": stats.prefix_queries,
        "prefix_cache_hits": stats.prefix_hits,
        # Of requests that have ended: what admission took them to generate, and what they did.
        "forecast_generation_tokens": stats.forecast.expected,
        "forecast_generation_tokens_actual": stats.forecast.actual,
        "forecast_generation_tokens_error": stats.forecast.error,
    }
    cumulative = list(accumulate(stats.step_counts))
    bounds = [*map(str, STEP_TIME_BOUNDS), "+Inf"]
    return [
        *(Gauge(f"nanoflow:{name}", labels, value) for name, value in gauges.items()),
        *(Counter(f"nanoflow:{name}", labels, value) for name, value in counters.items()),
        *(
            Counter("nanoflow:request_success", labels | {"finished_reason": reason}, value)
            for reason, value in stats.finished
        ),
        Histogram(
            "nanoflow:scheduler_step_time_seconds",
            labels,
            count=cumulative[-1],
            sum=stats.step_seconds,
            buckets=dict(zip(bounds, cumulative, strict=True)),
        ),
    ]


class StatusLine:
    """Logs at INFO what an engine does, every few seconds, while somebody calls tick().

    Safe to use from several threads.
    """

    def __init__(self, read: Callable[[], SchedulerStats], *, is_on: bool = True) -> None:
        self._read = read
        self._is_on = is_on
        self._lock = threading.Lock()
        self._time = -float("inf")  # of the last line, or of the begin of a busy time
        self._last: SchedulerStats | None = None

    def tick(self) -> None:
        """To be called whenever something has happened, and every STATUS_SECONDS at least."""
        elapsed = perf_counter() - self._time
        if elapsed < STATUS_SECONDS or not (self._is_on and logger.isEnabledFor(logging.INFO)):
            return
        if not self._lock.acquire(blocking=False):
            return
        try:
            last, stats = self._last, self._read()
            self._time, self._last = perf_counter(), stats
        finally:
            self._lock.release()
        if last is None or elapsed > 3 * STATUS_SECONDS:  # nothing ran in between
            return
        prompt = (stats.prompt_tokens - last.prompt_tokens) / elapsed
        generation = (stats.generation_tokens - last.generation_tokens) / elapsed
        queries = stats.prefix_queries - last.prefix_queries
        hits = stats.prefix_hits - last.prefix_hits
        logger.info(
            "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
            "Running: %d reqs, Waiting: %d reqs, KV cache usage: %.1f%%, "
            "Prefix cache hit rate: %.1f%%, Preemptions: %d",
            prompt,
            generation,
            stats.running,
            stats.waiting,
            100 * stats.kv_cache_usage,
            100 * hits / queries if queries else 0.0,
            stats.preemptions - last.preemptions,
        )
