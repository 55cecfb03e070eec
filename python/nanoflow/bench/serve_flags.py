"""Flags of `bench serve` that need more than a type. All raise ValueError naming the flag."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from nanoflow.bench import serve_metrics
from nanoflow.bench.serve_run import Ramp


def parse_metrics(options: argparse.Namespace) -> list[str]:
    chosen = [word for word in options.percentile_metrics.split(",") if word]
    for metric in chosen:
        _check_metric("--percentile-metrics", metric)
    return chosen


def _check_metric(flag: str, metric: str) -> None:
    known = serve_metrics.METRICS
    if metric not in known:
        raise ValueError(f"{flag} has {metric!r}; there are {', '.join(known)}")


def parse_percentiles(options: argparse.Namespace) -> list[float]:
    text = options.metric_percentiles
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= one <= 100 for one in found):
        raise ValueError(f"--metric-percentiles {text} must be numbers from 0 to 100, as in 50,99")
    return found


def parse_goodput(words: Sequence[str]) -> dict[str, float]:
    limits = {}
    for word in words:
        metric, _, text = word.partition(":")
        _check_metric("--goodput", metric)
        try:
            limits[metric] = float(text)
        except ValueError:
            raise ValueError(f"--goodput {word} must be METRIC:MILLISECONDS") from None
    return limits


def parse_metadata(words: Sequence[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise ValueError(f"--metadata {word} must be KEY=VALUE")
    return dict(word.split("=", 1) for word in words)


def parse_ramp(options: argparse.Namespace) -> Ramp | None:
    start, end = options.ramp_up_start_rps, options.ramp_up_end_rps
    if options.ramp_up_strategy is None:
        if start is not None or end is not None:
            raise ValueError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy")
        return None
    if start is None or end is None or not 0 < start <= end < math.inf:
        raise ValueError(
            f"--ramp-up-strategy {options.ramp_up_strategy} needs --ramp-up-start-rps and "
            f"--ramp-up-end-rps, above 0 and in this order, not {start} and {end}"
        )
    if options.request_rate != [math.inf]:
        raise ValueError("--ramp-up-strategy and --request-rate both say the rate: give one")
    return Ramp(options.ramp_up_strategy, start, end)


def check_duration(options: argparse.Namespace) -> None:
    if options.num_prompts is not None:
        raise ValueError("--duration and --num-prompts both say how many requests: give one")
    if options.duration <= 0 or any(math.isinf(rate) for rate in options.request_rate):
        raise ValueError(
            f"--duration {options.duration} must be above 0, and needs a --request-rate below inf"
        )
