"""Steps of a real engine, repeated until power and clock have settled, and the times of their ops.

A burst of a few milliseconds runs at full clock and says little of a server: the first half of
every run is dropped.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from nanoflow import _core
from nanoflow.bench.telemetry import Telemetry
from nanoflow.mixed_step import StepMix, deal_step, filling, issue
from nanoflow.plan_view import to_bar

OpName = tuple[str, int, str]  # stage, part, op: ("mlp", 1, "gemm")


@dataclass(frozen=True, slots=True)
class Run:
    """Sustained steps of one load with one schedule."""

    us: float  # of a step
    watts: float  # 0 where nothing measures them, as on a CPU
    mhz: float
    op_us: Mapping[OpName, float]  # of one layer, in the mean; those of the head as they are

    @property
    def joules(self) -> float:
        """Of a step, idle power included."""
        return self.watts * self.us * 1e-6


class Runner:
    """Runs loads on one engine, which is large enough for them."""

    def __init__(
        self, engine: _core.Engine, vocab_size: int, telemetry: Telemetry, seconds: float
    ) -> None:
        """`seconds`: of a run; from 2 on a GPU, whose board counts its energy ten times in one."""
        self._engine, self._vocab_size = engine, vocab_size
        self._telemetry, self._seconds = telemetry, seconds

    def fill(self) -> None:
        """The engine's cache, with what attention would find there."""
        batches = (
            step.batch(self._vocab_size, want_timings=False, first_page=page)
            for step, page in filling(self._engine.config)
        )
        for _ in issue(self._engine, batches):
            pass

    def run(self, schedule: _core.Schedule, mix: StepMix) -> Run:
        """Raises EngineError on a schedule that does not fit the device."""
        self._engine.set_schedule(schedule)
        step = deal_step(mix, schedule.cuts())
        us, begin, end, timings = self._repeat(
            step.batch(self._vocab_size, want_timings=False), step.batch(self._vocab_size)
        )
        power = self._telemetry.power(begin, end)
        op_us = mean_op_us(timings)
        if not _overlaps(timings):
            # Op by op there are gaps that replayed graphs do not have.
            total = sum(timing.end_us - timing.begin_us for timing in timings)
            scale = min(1.0, us / total)
            op_us = {name: scale * time for name, time in op_us.items()}
        return Run(us, power.watts if power else 0.0, power.sm_mhz if power else 0.0, op_us)

    def _repeat(
        self, batch: _core.Batch, timed: _core.Batch
    ) -> tuple[float, float, float, Sequence[_core.OpTiming]]:
        """Microseconds of a step in the second half of the time, when that was, and the ops of a
        step right behind."""
        in_flight: deque[_core.StepHandle] = deque()
        for _ in range(3):  # plans are made, the first step runs eagerly, graphs are captured
            self._engine.submit(batch).wait()
        start = perf_counter()
        begin, steps = start, 0
        while True:
            if len(in_flight) == 2:
                in_flight.popleft().wait()
                now = perf_counter()
                if now < start + self._seconds / 2:
                    begin = now
                else:
                    steps += 1
                if steps and now >= start + self._seconds:
                    break
            in_flight.append(self._engine.submit(batch))
        last = self._engine.submit(timed)
        for handle in in_flight:
            handle.wait()
        return (now - begin) / steps * 1e6, begin, now, last.wait().timings


def mean_op_us(timings: Sequence[_core.OpTiming]) -> dict[OpName, float]:
    """Of all layers but the first, whose embedding and plans stand beside its ops, if there are
    more."""
    times: dict[OpName, list[float]] = defaultdict(list)
    bars = [to_bar(timing) for timing in timings]
    layers = {bar.layer for bar in bars if bar.layer is not None}
    for bar in bars:
        if bar.layer != 0 or len(layers) == 1:
            times[bar.stage, bar.part, bar.op].append(bar.end_us - bar.begin_us)
    return {name: sum(found) / len(found) for name, found in times.items()}


def _overlaps(timings: Sequence[_core.OpTiming]) -> bool:
    spans = sorted((timing.begin_us, timing.end_us) for timing in timings)
    latest = 0.0
    for begin, end in spans:
        if begin < latest:
            return True
        latest = max(latest, end)
    return False
