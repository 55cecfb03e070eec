"""A layer's work as tasks on lanes: what the simulator runs, and the search reorders.

The order of issue and the dependencies are those of csrc/pipeline/planner.cc, at the grain of stage
parts: the ops of a part follow each other on one lane, and all that two parts of a step share are
rows. A row goes through the stages in turn, so a part waits for the parts of the stage before it
that hold some of its segments; parts of stages that run in turn wait for each other, too.
`tests/python/test_tune_program.py` holds both against real plans.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanoflow._core import Schedule

STAGES = ("qkv", "attn", "o", "mlp")  # of a layer, in the order a row takes them
_NEXT_LAYER = "@+1"


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of every layer's work."""

    name: str  # "mlp.1"
    lane: int
    after: tuple[tuple[str, int], ...] = ()  # tasks that must have finished, so many layers earlier

    def waits(self, layer: int, layers: int) -> list[tuple[str, int]]:
        """The tasks of `layers` layers that it waits for in one of them."""
        return [(name, layer - back) for name, back in self.after if 0 <= layer - back < layers]


@dataclass(frozen=True, slots=True)
class Program:
    """The tasks of a layer, and one period of their order of issue."""

    tasks: tuple[Task, ...]
    order: tuple[tuple[int, int], ...]  # index of a task, layers ahead of the period's own: 0 or 1

    def issue(self, layers: int) -> list[tuple[int, int]]:
        """(task, layer) of all layers, in order: first what a period before them would issue."""
        issue = [(task, 0) for task, ahead in self.order if ahead == 1]
        for layer in range(layers):
            issue += [(task, layer + ahead) for task, ahead in self.order if layer + ahead < layers]
        return issue


@dataclass(frozen=True, slots=True)
class Part:
    """A nano-batch of one stage: a range of the segments between the schedule's cuts."""

    stage: str
    number: int
    begin: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.stage}.{self.number}"

    def shares(self, other: Part) -> bool:
        return self.begin < other.end and other.begin < self.end


def parts_of(schedule: Schedule) -> list[Part]:
    """Of all stages of a layer, in sequential order."""
    cuts = schedule.cuts()
    parts: list[Part] = []
    for stage in STAGES:
        spec = schedule.stages.get(stage)
        split = [] if spec is None else spec.split
        bounds = [0, *(1 + cuts.index(fraction) for fraction in split), len(cuts) + 1]
        parts += [
            Part(stage, number, begin, end)
            for number, (begin, end) in enumerate(itertools.pairwise(bounds))
        ]
    return parts


def program_of(schedule: Schedule) -> Program:
    """What the planner makes of a schedule that has passed `Schedule.check`."""
    parts = parts_of(schedule)
    tasks = []
    for part in parts:
        lane = schedule.lane_of(part.stage, part.number)
        before = STAGES[STAGES.index(part.stage) - 1]  # of qkv: mlp, in the layer before
        after = tuple(
            (other.name, int(part.stage == "qkv"))
            for other in parts
            if other.stage == before and part.shares(other)
        )
        tasks.append(Task(part.name, lane, after))
    order = _order(schedule.order, parts)
    in_turn = {name for name, spec in schedule.stages.items() if spec.in_turn}
    turns = [(index, ahead) for index, ahead in order if parts[index].stage in in_turn]
    for place, (index, ahead) in enumerate(turns):
        # Those issued since its own turn before: earlier in this period, or later in the last one.
        others = tuple(
            (parts[other].name, ahead - others_ahead + int(others_place > place))
            for others_place, (other, others_ahead) in enumerate(turns)
            if other != index
        )
        tasks[index] = replace(tasks[index], after=tasks[index].after + others)
    return Program(tuple(tasks), order)


def _order(items: Sequence[str], parts: Sequence[Part]) -> tuple[tuple[int, int], ...]:
    """Attention that the order leaves out follows the last qkv part it needs."""
    index = {part.name: i for i, part in enumerate(parts)}
    if not items:
        return tuple((i, 0) for i in range(len(parts)))
    order: list[tuple[int, int]] = []
    follows = not any(item.startswith("attn") for item in items)
    covered: set[tuple[int, int]] = set()  # layers ahead, segment
    waiting = [part for part in parts if part.stage == "attn"] if follows else []
    periods = [(item.removesuffix(_NEXT_LAYER), int(item.endswith(_NEXT_LAYER))) for item in items]
    # A part may need qkv parts of two periods: those issued a period ago are one layer less ahead.
    for name, ahead in periods:
        if name.startswith("qkv") and ahead == 1:
            covered |= {(0, s) for s in range(parts[index[name]].begin, parts[index[name]].end)}
    for name, ahead in periods:
        order.append((index[name], ahead))
        if not name.startswith("qkv"):
            continue
        covered |= {(ahead, s) for s in range(parts[index[name]].begin, parts[index[name]].end)}
        for part in list(waiting):
            if all((ahead, segment) in covered for segment in range(part.begin, part.end)):
                order.append((index[part.name], ahead))
                waiting.remove(part)
    return tuple(order)
