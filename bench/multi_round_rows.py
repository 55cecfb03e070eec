"""What multi_round.py measures of each mode, and the modes beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Unique:
    """Requests that have nothing in common, each time others; a list has one entry a time."""

    requests: int
    total_tokens_per_second: list[float]
    cpu_seconds: list[float]
    device_idle: float  # share of the time; at most, as nanoflow:engine_idle_seconds


@dataclass(frozen=True)
class Row:
    mode: str
    seconds: float
    cpu_seconds: float  # of this process, which other processes on the machine change little
    prompt_tokens: int
    output_tokens: int
    prefill_tokens_computed: int  # with what preemptions made necessary again
    total_tokens_per_second: float
    mean_first_token_seconds: float  # from the second round on
    device_idle: float  # share of the time in which requests were open; at most
    metrics: dict[str, float]  # of the tiers
    bytes_per_second: dict[str, float]  # between tiers; of the SSD, by one of its threads
    unique: Unique | None


def cost_without_reuse(rows: Sequence[Row]) -> dict[str, Any]:
    """Of each mode with tiers beside the one with prefix caching alone, by medians."""
    of = {row.mode: row.unique for row in rows if row.unique is not None}
    base = of["prefix"]
    return {
        "requests": base.requests,
        **{
            mode: {
                "lost": 1
                - median(one.total_tokens_per_second) / median(base.total_tokens_per_second),
                "cpu_seconds_added": median(one.cpu_seconds) / median(base.cpu_seconds) - 1,
                "device_idle": one.device_idle,
            }
            for mode, one in of.items()
            if mode != "prefix"
        },
    }


def beside_off(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Of each mode: how many times less of the prompts was computed, and the tokens a second."""
    [off] = [row for row in rows if row.mode == "off"]
    return {
        row.mode: {
            "times_less_prefill": off.prefill_tokens_computed / row.prefill_tokens_computed,
            "throughput": row.total_tokens_per_second / off.total_tokens_per_second,
        }
        for row in rows
        if row is not off
    }
