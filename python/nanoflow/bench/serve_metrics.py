"""What a serving run comes to: vLLM's fields, and the paper's normalised latency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

SLO_MS = 200.0  # of the NanoFlow paper, mean time per output token
METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


@dataclass(slots=True)
class Served:
    """A request as its client saw it; times in seconds from the start of the run."""

    prompt_len: int
    start: float
    news: list[tuple[float, int]] = field(default_factory=list)  # when so many tokens came
    text: str = ""
    error: str | None = None

    @property
    def output_len(self) -> int:
        return sum(count for _, count in self.news)

    @property
    def end(self) -> float:
        return self.news[-1][0]

    @property
    def latency(self) -> float:
        return self.end - self.start

    @property
    def ttft(self) -> float:
        return self.news[0][0] - self.start

    @property
    def itls(self) -> list[float]:
        """Seconds between news."""
        return [b - a for (a, _), (b, _) in pairwise(self.news)]

    @property
    def tpot(self) -> float | None:
        """Of a request with one token there is none."""
        return None if self.output_len < 2 else (self.end - self.news[0][0]) / (self.output_len - 1)

    @property
    def normalized_latency(self) -> float:
        """Seconds per output token, the time before the first one included (paper, section 6)."""
        return self.latency / self.output_len

    def milliseconds(self) -> dict[str, list[float]]:
        """Values of each of METRICS."""
        return {
            "ttft": [self.ttft * 1e3],
            "tpot": [] if self.tpot is None else [self.tpot * 1e3],
            "itl": [gap * 1e3 for gap in self.itls],
            "e2el": [self.latency * 1e3],
        }


def summary(
    served: Sequence[Served],
    duration: float,
    *,
    percentiles: Sequence[float] = (99.0,),
    goodput: Mapping[str, float] | None = None,
    slo_ms: float = SLO_MS,
) -> dict[str, Any]:
    """Of a run that took `duration` seconds. `goodput`: limits of metrics in milliseconds.

    Raises ValueError when no request has completed.
    """
    done = [one for one in served if one.error is None]
    if not done:
        raise ValueError(f"none of {len(served)} requests completed; the first: {served[0].error}")
    prompt = sum(one.prompt_len for one in done)
    output = sum(one.output_len for one in done)
    normalized = np.array([one.normalized_latency * 1e3 for one in done])
    values: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for one in done:
        for metric, found in one.milliseconds().items():
            values[metric] += found
    return {
        "duration": duration,
        "completed": len(done),
        "failed": len(served) - len(done),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / duration,
        "request_goodput": _goodput(done, goodput) / duration if goodput else None,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
        "max_output_tokens_per_s": _most_tokens_in_a_second(done),
        "max_concurrent_requests": _most_at_once(done),
        **_statistics("normalized_latency", normalized, percentiles),
        "slo_ms": slo_ms,
        "within_slo": bool(normalized.mean() <= slo_ms),
        "requests_within_slo": float((normalized <= slo_ms).mean()),
        **{
            key: value
            for metric, found in values.items()
            for key, value in _statistics(metric, np.array(found), percentiles).items()
        },
    }


def details(served: Sequence[Served]) -> dict[str, Any]:
    """The fields that vLLM adds with --save-detailed."""
    done = [one if one.news else None for one in served]
    return {
        "input_lens": [one.prompt_len for one in served],
        "output_lens": [one.output_len for one in served],
        "ttfts": [one.ttft if one else 0.0 for one in done],
        "itls": [one.itls if one else [] for one in done],
        "latencies": [one.latency if one else 0.0 for one in done],
        "start_times": [one.start for one in served],
        "generated_texts": [one.text for one in served],
        "errors": [one.error or "" for one in served],
    }


def lines(found: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The table that `vllm bench serve` prints, and the normalised latency."""
    rows = [
        ("Successful requests:", found["completed"]),
        ("Failed requests:", found["failed"]),
        ("Maximum request concurrency:", found.get("max_concurrency")),
        ("Request rate configured (RPS):", found.get("request_rate")),
        ("Benchmark duration (s):", found["duration"]),
        ("Total input tokens:", found["total_input_tokens"]),
        ("Total generated tokens:", found["total_output_tokens"]),
        ("Request throughput (req/s):", found["request_throughput"]),
        ("Request goodput (req/s):", found["request_goodput"]),
        ("Output token throughput (tok/s):", found["output_throughput"]),
        ("Peak output token throughput (tok/s):", found["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", found["max_concurrent_requests"]),
        ("Total token throughput (tok/s):", found["total_token_throughput"]),
    ]
    text = [f"{' Serving Benchmark Result ':=^50}", *(_row(*row) for row in rows)]
    for metric in metrics:
        text.append(f"{METRICS[metric]:-^50}")
        text += _metric_rows(found, metric, metric.upper(), percentiles)
    text.append(f"{'Normalized Latency (per output token)':-^50}")
    text += _metric_rows(found, "normalized_latency", "normalized", percentiles)
    is_met = "met" if found["within_slo"] else "missed"
    text.append(_row(f"SLO of the mean, {is_met} (ms):", found["slo_ms"]))
    text.append(_row("Requests within it (%):", 100 * found["requests_within_slo"]))
    return "\n".join(filter(None, [*text, "=" * 50]))


def percentile_name(percentile: float) -> str:
    return f"p{percentile:g}"


def _metric_rows(
    found: Mapping[str, Any], metric: str, label: str, percentiles: Sequence[float]
) -> list[str]:
    names = ["mean", "median", *map(percentile_name, percentiles)]
    return [
        _row(f"{name[0].upper()}{name[1:]} {label} (ms):", found[f"{name}_{metric}_ms"])
        for name in names
    ]


def _row(name: str, value: float | str | None) -> str:
    if value is None:
        return ""
    number = f"{value:<10.2f}" if isinstance(value, float) else f"{value:<10}"
    return f"{name:<40} {number}".rstrip()


def _statistics(
    metric: str, values: np.ndarray[Any, Any], percentiles: Sequence[float]
) -> dict[str, float]:
    """Zeros where there is nothing, as in vLLM."""
    if values.size == 0:
        values = np.zeros(1)
    found = {"mean": values.mean(), "median": np.median(values), "std": values.std()}
    for percentile in percentiles:
        found[percentile_name(percentile)] = np.percentile(values, percentile)
    return {f"{name}_{metric}_ms": float(value) for name, value in found.items()}


def _goodput(done: Sequence[Served], limits: Mapping[str, float]) -> int:
    """Requests with all metrics within their limits."""
    return sum(
        all(max(one.milliseconds()[metric], default=0.0) <= ms for metric, ms in limits.items())
        for one in done
    )


def _most_tokens_in_a_second(done: Sequence[Served]) -> float:
    seconds: Counter[int] = Counter()
    for one in done:
        for time, count in one.news:
            seconds[int(time)] += count
    return float(max(seconds.values()))


def _most_at_once(done: Sequence[Served]) -> int:
    changes = sorted([(one.start, 1) for one in done] + [(one.end, -1) for one in done])
    return int(np.cumsum([change for _, change in changes]).max())
