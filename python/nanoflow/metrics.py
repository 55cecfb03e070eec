"""Metrics with vLLM's names, under `nanoflow:`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter

from nanoflow.energy import EnergyMeter
from nanoflow.offload.stats import OffloadStats
from nanoflow.scheduler.stats import STEP_TIME_BOUNDS, SchedulerStats

logger = logging.getLogger(__name__)

STATUS_SECONDS = 10.0  # between status lines, as in vLLM
IDLE_SECONDS = 30.0  # without a status line: nothing ran for a while


@dataclass(frozen=True, slots=True)
class Metric:
    """A value with a name and labels."""

    name: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """Only grows. An int, or a number of seconds."""

    value: float


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


def counted_by(label: str, name: str, metrics: Iterable[Metric]) -> dict[str, float]:
    """Values of the counters of this name, by this one of their labels."""
    return {
        metric.labels[label]: metric.value
        for metric in metrics
        if isinstance(metric, Counter) and metric.name == name
    }


def make_metrics(
    stats: SchedulerStats, model_name: str, meter: EnergyMeter | None = None
) -> list[Metric]:
    """All metrics of an engine; `meter`: of its GPU."""
    labels = {"model_name": model_name, "engine": "0"}
    offload = stats.offload or OffloadStats()
    gauges = {
        "num_requests_running": stats.running,
        "num_requests_waiting": stats.waiting,
        "kv_cache_usage_perc": stats.kv_cache_usage,  # from 0 to 1, whatever its name says
    }
    counters = {
        "num_preemptions": stats.preemptions,
        "prompt_tokens": stats.prompt_tokens,
        "prompt_tokens_cached": stats.prefix_hits + offload.num_hits,
        "generation_tokens": stats.generation_tokens,
        "prefix_cache_queries": stats.prefix_queries,
        "prefix_cache_hits": stats.prefix_hits,
        # Of requests that have ended: what admission took them to generate, and what they did.
        "forecast_generation_tokens": stats.forecast.expected,
        "forecast_generation_tokens_actual": stats.forecast.actual,
        "forecast_generation_tokens_error": stats.forecast.error,
        # While requests were open; without a step on the device: at most (scheduler/idle.py).
        "engine_open_seconds": stats.engine_times.open,
        "engine_idle_seconds": stats.engine_times.idle,
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
        *(
            Counter(
                "nanoflow:admission_rejections",
                labels | {"reason": f"max_num_queued_{unit}"},
                value,
            )
            for unit, value in stats.rejected
        ),
        *(
            Counter("nanoflow:steps", labels | {"schedule": name}, value)
            for name, value in stats.schedules
        ),
        Histogram(
            "nanoflow:scheduler_step_time_seconds",
            labels,
            count=cumulative[-1],
            sum=stats.step_seconds,
            buckets=dict(zip(bounds, cumulative, strict=True)),
        ),
        *_offload_metrics(offload, labels),
        *_energy_metrics(meter, labels),
    ]


def _energy_metrics(meter: EnergyMeter | None, labels: Mapping[str, str]) -> Iterator[Metric]:
    joules = None if meter is None else meter.joules()
    watts = None if meter is None else meter.watts()
    if joules is not None:
        yield Counter("nanoflow:gpu_energy_joules", labels, joules)
    if watts is not None:
        yield Gauge("nanoflow:gpu_power_watts", labels, watts)


def _offload_metrics(stats: OffloadStats, labels: Mapping[str, str]) -> Iterator[Metric]:
    """Of the tiers below the device. Tokens, but for what is called bytes or time (seconds)."""

    def counter(name: str, value: float, **more: str) -> Counter:
        return Counter(f"nanoflow:{name}", {**labels, **more}, value)

    yield counter("external_prefix_cache_queries", stats.queries)
    yield counter("external_prefix_cache_hits", stats.num_hits)
    yield counter("kv_offload_resumed_tokens", stats.resumed)
    for tier, hits in stats.hits.items():
        yield counter("kv_offload_hits", hits, tier=tier)
    for tier, usage in stats.usage.items():
        yield Gauge("nanoflow:kv_offload_usage_perc", {**labels, "tier": tier}, usage)
    for transfer, traffic in stats.traffic.items():
        yield counter("kv_offload_total_bytes", traffic.bytes, transfer_type=transfer.value)
        yield counter("kv_offload_total_time", traffic.seconds, transfer_type=transfer.value)
    for error, count in stats.errors.items():
        yield counter("kv_offload_errors", count, error=error)


class StatusLine:
    """Logs at INFO what an engine does, every few seconds, while somebody calls tick().

    Safe to use from several threads.
    """

    def __init__(
        self,
        read: Callable[[], SchedulerStats],
        *,
        is_on: bool = True,
        meter: EnergyMeter | None = None,
    ) -> None:
        self._read = read
        self._meter = meter
        self._joules: float | None = None  # at the last line
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
            before = self._joules
            self._joules = None if self._meter is None else self._meter.joules()
            energy = None if before is None or self._joules is None else self._joules - before
        finally:
            self._lock.release()
        if last is None or elapsed > IDLE_SECONDS:
            return
        prompt = (stats.prompt_tokens - last.prompt_tokens) / elapsed
        generation = (stats.generation_tokens - last.generation_tokens) / elapsed
        queries = stats.prefix_queries - last.prefix_queries
        hits = stats.prefix_hits - last.prefix_hits
        open_ = stats.engine_times.open - last.engine_times.open
        idle = stats.engine_times.idle - last.engine_times.idle
        logger.info(
            "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
            "Running: %d reqs, Waiting: %d reqs, KV cache usage: %.1f%%, "
            "Prefix cache hit rate: %.1f%%, Preemptions: %d, Device idle: at most %.1f%%%s",
            prompt,
            generation,
            stats.running,
            stats.waiting,
            100 * stats.kv_cache_usage,
            100 * hits / queries if queries else 0.0,
            stats.preemptions - last.preemptions,
            100 * min(1.0, idle / open_) if open_ > 0 else 0.0,
            _energy_text(energy, elapsed, elapsed * (prompt + generation)),
        )


def _energy_text(joules: float | None, seconds: float, tokens: float) -> str:
    if joules is None:
        return ""
    per_token = f", {joules / tokens:.3f} J/token" if tokens > 0 else ""
    return f", GPU: {joules / seconds:.0f} W{per_token}"
