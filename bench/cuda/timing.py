"""Timing on one GPU: short bursts, and sustained runs beside power and clock."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from nanoflow.bench.environment import command_line
from nanoflow.bench.telemetry import Telemetry


def environment(commit: str) -> dict[str, Any]:
    """What a result must say of where it comes from."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "command": command_line(),
        "seed": torch.initial_seed(),
    }


def burst_us(enqueue: Callable[[int], object], repeats: int = 9) -> float:
    """Median of single runs, launched behind a spinning kernel that hides the launches."""
    for i in range(2):
        enqueue(i)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(1_000_000)
    marks[0].record()
    for i in range(repeats):
        enqueue(i)
        marks[i + 1].record()
    marks[-1].synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return times[repeats // 2] * 1e3


def sustained(enqueue: Callable[[int], object], seconds: float = 2.0) -> dict[str, float]:
    """µs a run, W and MHz over the second half of `seconds` of uninterrupted work."""
    estimate = max(burst_us(enqueue, 5), 5.0)
    batch = max(int(20e3 / estimate), 1)  # about 20 ms
    marks: list[tuple[torch.cuda.Event, float]] = []
    begin = time.perf_counter()
    runs = 0
    with Telemetry(f"cuda:{torch.cuda.current_device()}") as telemetry:
        while time.perf_counter() - begin < seconds:
            for _ in range(batch):
                enqueue(runs)
                runs += 1
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            marks.append((mark, runs))
            if len(marks) > 2:
                marks[-3][0].synchronize()  # at most two batches are queued
        torch.cuda.synchronize()
        power = telemetry.power(begin + seconds / 2, time.perf_counter())
    middle = marks[len(marks) // 2]
    last = marks[-1]
    elapsed_us = middle[0].elapsed_time(last[0]) * 1e3
    return {
        "us": elapsed_us / (last[1] - middle[1]),
        "watts": power.watts if power else float("nan"),
        "sm_mhz": power.sm_mhz if power else float("nan"),
    }
