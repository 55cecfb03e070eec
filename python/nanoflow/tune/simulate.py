"""How long a program takes on lanes that slow each other down, and how much energy.

Two models of what tasks do to each other:

- `LaneWidths`: lanes own parts of the device, so a task takes what it takes alone on its lane,
  times the slow-downs measured for pairs, and all wait for the device's memory where together
  they read more than it lets through;
- `SharedDevice`: NanoFlow's (OSDI'25, section 4.1): a task beside a product of matrices leaves it
  1 - R of its speed, and gets P(R) of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from nanoflow.tune.program import Program

LAYERS = 8  # simulated; more layers repeat the period
_SETTLED = 3  # periods that the steady state is the mean of


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a task alone on its lane."""

    us: float
    joules: float = 0.0  # above idle
    kind: str = "compute"  # or memory, network: what it mostly uses
    share: float = 0.0  # R: of the device's compute that it takes from a product beside it
    moved: float = 0.0  # bytes that it reads from the device's memory


class Interference(Protocol):
    def speeds(self, running: Sequence[Cost]) -> list[float]:
        """Of tasks that run side by side, each relative to it alone on its lane."""


@dataclass(frozen=True, slots=True)
class LaneWidths:
    """`slowdown[kind, beside]`: time of a task of one kind beside one of another, over its own.

    Tasks side by side that would read more than `bytes_per_us` are all slowed in proportion. A task
    alone is not: what it takes is measured.
    """

    slowdown: Mapping[tuple[str, str], float]
    bytes_per_us: float = 0.0  # of the device's memory; 0: no limit

    def speeds(self, running: Sequence[Cost]) -> list[float]:
        speeds = [1.0] * len(running)
        for i, one in enumerate(running):
            for j, other in enumerate(running):
                if i != j:
                    speeds[i] /= self.slowdown.get((one.kind, other.kind), 1.0)
        if len(running) < 2 or self.bytes_per_us <= 0:
            return speeds
        read = sum(  # a µs
            speed * cost.moved / cost.us
            for speed, cost in zip(speeds, running, strict=True)
            if cost.us > 0
        )
        scale = min(1.0, self.bytes_per_us / read) if read > 0 else 1.0
        return [speed * scale for speed in speeds]


@dataclass(frozen=True, slots=True)
class SharedDevice:
    """`performance[kind]`: points (R, P), ascending; straight lines between them, (0, 0), (1, 1).

    Shares add up. Without a product beside them, tasks share all of the device in proportion.
    """

    performance: Mapping[str, Sequence[tuple[float, float]]]

    def speeds(self, running: Sequence[Cost]) -> list[float]:
        taken = sum(cost.share for cost in running if cost.kind != "compute")
        computes = any(cost.kind == "compute" for cost in running)
        scale = 1.0 if computes or taken == 0 else 1 / taken
        return [
            max(0.0, 1 - taken) if cost.kind == "compute" else self._gets(cost, scale)
            for cost in running
        ]

    def _gets(self, cost: Cost, scale: float) -> float:
        points = [(0.0, 0.0), *self.performance[cost.kind], (1.0, 1.0)]
        share = min(1.0, cost.share * scale)
        for (left, low), (right, high) in itertools.pairwise(points):
            if share <= right:
                return low + (high - low) * (share - left) / (right - left) if right > left else low
        return 1.0


@dataclass(frozen=True, slots=True)
class Span:
    """When a task of one layer ran; microseconds from the step's start."""

    task: int
    layer: int
    begin_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Steady:
    """Of the layers of a step."""

    period_us: float  # from a layer to the next, once it repeats
    first_us: float  # of LAYERS layers from the step's start to their end

    def layers_us(self, layers: int) -> float:
        """Of so many layers; fewer than were simulated count in proportion."""
        if layers <= LAYERS:
            return self.first_us * layers / LAYERS
        return self.first_us + (layers - LAYERS) * self.period_us


def simulate(
    program: Program, costs: Sequence[Cost], interference: Interference, layers: int = LAYERS
) -> list[Span]:
    """Runs each lane's tasks in order of issue, each as soon as those it waits for have finished.

    `costs`: of the program's tasks. Raises ValueError where the order issues a task before one
    that it waits for, as the planner does.
    """
    issued = _instances(program, layers)
    us = [cost.us for cost in costs]
    memo: dict[tuple[int, ...], list[float]] = {}
    left, waits_for = [0.0] * len(issued.tasks), [*issued.needs]
    begin, end = [0.0] * len(issued.tasks), [0.0] * len(issued.tasks)
    heads, is_busy = [0] * len(issued.queues), [False] * len(issued.queues)
    running: list[int] = []
    now = 0.0
    while True:
        for lane, queue in enumerate(issued.queues):
            if is_busy[lane] or heads[lane] == len(queue) or waits_for[queue[heads[lane]]]:
                continue
            item = queue[heads[lane]]
            running.append(item)
            is_busy[lane] = True
            begin[item], left[item] = now, us[issued.tasks[item]]
        if not running:
            break
        key = tuple([issued.tasks[item] for item in running])
        if key not in memo:
            memo[key] = interference.speeds([costs[task] for task in key])
        speeds = memo[key]
        waits = [
            left[item] / speed for item, speed in zip(running, speeds, strict=True) if speed > 0
        ]
        if not waits:
            raise ValueError(f"nothing gets on: {[program.tasks[task].name for task in key]}")
        wait = min(waits)
        now += wait
        still = []
        for item, task, speed in zip(running, key, speeds, strict=True):
            left[item] -= wait * speed
            if left[item] > 1e-9 * us[task]:
                still.append(item)
                continue
            end[item] = now
            lane = program.tasks[task].lane
            heads[lane] += 1
            is_busy[lane] = False
            for other in issued.needed_by[item]:
                waits_for[other] -= 1
        running = still
    spans = zip(issued.tasks, issued.layers, begin, end, strict=True)
    return [Span(*span) for span in spans]


def steady(program: Program, costs: Sequence[Cost], interference: Interference) -> Steady:
    """The period that a long step settles to. Raises ValueError as `simulate` does."""
    ends = [0.0] * LAYERS
    for span in simulate(program, costs, interference):
        ends[span.layer] = max(ends[span.layer], span.end_us)
    # The last layer has nothing of a next one beside it.
    period = (ends[LAYERS - 2] - ends[LAYERS - 2 - _SETTLED]) / _SETTLED
    return Steady(period, ends[LAYERS - 1])


@dataclass(frozen=True, slots=True)
class _Issued:
    """The tasks of all layers in order of issue, and their indices there."""

    tasks: Sequence[int]
    layers: Sequence[int]
    queues: Sequence[Sequence[int]]  # of each lane
    needs: Sequence[int]  # how many others each waits for
    needed_by: Sequence[Sequence[int]]


@lru_cache(maxsize=64)  # the same program is simulated at several clocks
def _instances(program: Program, layers: int) -> _Issued:
    place: dict[tuple[str, int], int] = {}
    issue = program.issue(layers)
    queues: list[list[int]] = [[] for _ in range(1 + max(task.lane for task in program.tasks))]
    needs: list[int] = []
    needed_by: list[list[int]] = [[] for _ in issue]
    for i, (index, layer) in enumerate(issue):
        task = program.tasks[index]
        needed = task.waits(layer, layers)
        if missing := [name for name in needed if name not in place]:
            raise ValueError(
                f"{task.name} of layer {layer} is issued before {missing[0][0]} of layer "
                f"{missing[0][1]}, on which it depends"
            )
        needs.append(len(needed))
        for name in needed:
            needed_by[place[name]].append(i)
        place[task.name, layer] = i
        queues[task.lane].append(i)
    return _Issued([t for t, _ in issue], [at for _, at in issue], queues, needs, needed_by)
