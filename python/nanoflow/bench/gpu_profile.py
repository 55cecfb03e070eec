"""What the GPU did in a few steps, from CUPTI's records of every kernel (by way of torch)."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOP = 15
CONTEXT = 4  # kernels before one that tell it from others of its name
SPAN = (0.3, 0.9)  # of what was recorded: starting and stopping disturbs its ends
NAME_LENGTH = 160
NETWORK = "nccl"  # begins the names of collectives between GPUs


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    stream: int
    begin_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Of a mean step, while it was being recorded. Recording itself may widen the gaps."""

    step_ms: float
    kernel_sum_ms: float  # of all durations
    busy_ms: float  # with at least one kernel running
    network_ms: float  # of all collectives between GPUs, waiting for the others included
    network_alone_ms: float  # with nothing but collectives running
    kernels: list[dict[str, Any]]  # the longest

    @property
    def gpu_idle_pct(self) -> float:
        return 100 * (1 - self.busy_ms / self.step_ms)

    @property
    def network_hidden_pct(self) -> float | None:
        """Of the time of collectives; None without any."""
        if self.network_ms == 0:
            return None
        return 100 * (1 - self.network_alone_ms / self.network_ms)

    def to_json(self) -> dict[str, Any]:
        return {
            "step_ms": self.step_ms,
            "kernel_sum_ms": self.kernel_sum_ms,
            "busy_ms": self.busy_ms,
            "gpu_idle_pct": self.gpu_idle_pct,
            "network_ms": self.network_ms,
            "network_hidden_pct": self.network_hidden_pct,
            "kernels": self.kernels,
        }


class ProfileError(RuntimeError):
    """There is nothing to see, and why."""


class Profiler:
    """Records kernels of this process, those in replayed graphs too. Needs torch with CUDA."""

    def __init__(self) -> None:
        """Raises ProfileError. Importing takes seconds: make it before anything is measured."""
        try:
            import torch
        except ImportError:
            raise ProfileError("torch is not installed") from None
        if not torch.cuda.is_available():
            raise ProfileError("torch sees no GPU")
        self._torch = torch

    def record(self, wait: Callable[[], float]) -> Profile:
        """Records while `wait` waits; it returns the mean milliseconds of a step meanwhile."""
        profiler = self._torch.profiler
        try:
            with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as recorded:
                step_ms = wait()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                recorded.export_chrome_trace(str(path))
                events = json.loads(path.read_text())["traceEvents"]
        except (RuntimeError, OSError, ValueError) as error:
            raise ProfileError(f"torch.profiler: {error}") from error
        return summarize(kernels_of(events), step_ms)


def kernels_of(events: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    """The kernels among the events of a Chrome trace, in order of their beginnings: those of the
    first GPU that has any, as ranks do the same."""
    records = [one for one in events if one.get("ph") == "X" and one.get("cat") == "kernel"]
    first = min((one["args"]["device"] for one in records), default=0)
    kernels = [
        Kernel(one["name"], one["tid"], one["ts"], one["ts"] + one["dur"])
        for one in records
        if one["args"]["device"] == first
    ]
    return sorted(kernels, key=lambda kernel: kernel.begin_us)


def summarize(kernels: list[Kernel], step_ms: float) -> Profile:
    """Raises ProfileError when there is no kernel.

    Time is counted in the middle of the record (SPAN) and handed to steps by their length. Kernels
    of one name are told apart by those before them on their stream: matrix products of one
    template, say.
    """
    if not kernels:
        raise ProfileError("no kernel was recorded")
    first, last = kernels[0].begin_us, max(kernel.end_us for kernel in kernels)
    begin, end = (first + share * (last - first) for share in SPAN)
    steps = (end - begin) / (step_ms * 1e3)
    before: dict[int, tuple[str, ...]] = defaultdict(tuple)
    total: dict[tuple[str, ...], float] = defaultdict(float)
    count: dict[tuple[str, ...], int] = defaultdict(int)
    for kernel in kernels:
        key = (*before[kernel.stream], kernel.name)
        before[kernel.stream] = key[-CONTEXT:]
        from_, to = max(kernel.begin_us, begin), min(kernel.end_us, end)
        if to <= from_:
            continue
        total[key] += to - from_
        count[key] += 1
    longest = sorted(total, key=lambda key: -total[key])[:TOP]
    busy = _busy_us(kernels, begin, end)
    local = [kernel for kernel in kernels if not kernel.name.startswith(NETWORK)]
    network = sum(us for key, us in total.items() if key[-1].startswith(NETWORK))
    return Profile(
        step_ms=step_ms,
        kernel_sum_ms=sum(total.values()) / steps * 1e-3,
        busy_ms=busy / steps * 1e-3,
        network_ms=network / steps * 1e-3,
        network_alone_ms=(busy - _busy_us(local, begin, end)) / steps * 1e-3,
        kernels=[
            {
                "name": key[-1][:NAME_LENGTH],
                "after": key[-2][:NAME_LENGTH] if len(key) > 1 else None,
                "us_per_step": total[key] / steps,
                "runs_per_step": count[key] / steps,
                "mean_us": total[key] / count[key],
            }
            for key in longest
        ],
    )


def _busy_us(kernels: Iterable[Kernel], begin: float, end: float) -> float:
    """Between begin and end, with at least one of the kernels running; they come in order."""
    busy, covered = 0.0, begin
    for kernel in kernels:
        to = min(kernel.end_us, end)
        busy += max(0.0, to - max(kernel.begin_us, covered))
        covered = max(covered, to)
    return busy
