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
    lanes, needs = _instances(program, layers)
    memo: dict[tuple[int, ...], list[float]] = {}
    left = [0.0] * len(needs)
    begin, end = [0.0] * len(needs), [-1.0] * len(needs)
    heads = [0] * len(lanes)
    running: list[int] = []
    now = 0.0
    issue = program.issue(layers)
    while True:
        for lane, queue in enumerate(lanes):
            if heads[lane] >= len(queue):
                continue
            item = queue[heads[lane]]
            if item not in running and all(end[need] >= 0 for need in needs[item]):
                running.append(item)
                begin[item] = now
                left[item] = costs[issue[item][0]].us
        if not running:
            break
        key = tuple(issue[item][0] for item in running)
        if key not in memo:
            memo[key] = interference.speeds([costs[task] for task in key])
        speeds = memo[key]
        wait = min(
            (left[item] / speed for item, speed in zip(running, speeds, strict=True) if speed > 0),
            default=None,
        )
        if wait is None:
            raise ValueError(f"nothing gets on: {[program.tasks[task].name for task in key]}")
        now += wait
        still = []
        for item, speed in zip(running, speeds, strict=True):
            left[item] -= wait * speed
            if left[item] <= 1e-9 * costs[issue[item][0]].us:
                end[item] = now
                heads[program.tasks[issue[item][0]].lane] += 1
            else:
                still.append(item)
        running = still
    return [Span(task, layer, begin[i], end[i]) for i, (task, layer) in enumerate(issue)]


def steady(program: Program, costs: Sequence[Cost], interference: Interference) -> Steady:
    """The period that a long step settles to. Raises ValueError as `simulate` does."""
    ends = [0.0] * LAYERS
    for span in simulate(program, costs, interference):
        ends[span.layer] = max(ends[span.layer], span.end_us)
    # The last layer has nothing of a next one beside it.
    period = (ends[LAYERS - 2] - ends[LAYERS - 2 - _SETTLED]) / _SETTLED
    return Steady(period, ends[LAYERS - 1])


def _instances(program: Program, layers: int) -> tuple[list[list[int]], list[list[int]]]:
    """Each lane's queue, and what each issued task waits for; both as indices of the issue."""
    place: dict[tuple[str, int], int] = {}
    lanes: list[list[int]] = [[] for _ in range(1 + max(task.lane for task in program.tasks))]
    needs: list[list[int]] = []
    for i, (index, layer) in enumerate(program.issue(layers)):
        task = program.tasks[index]
        needed = task.waits(layer, layers)
        if missing := [name for name in needed if name not in place]:
            raise ValueError(
                f"{task.name} of layer {layer} is issued before {missing[0][0]} of layer "
                f"{missing[0][1]}, on which it depends"
            )
        needs.append([place[name] for name in needed])
        place[task.name, layer] = i
        lanes[task.lane].append(i)
    return lanes, needs
