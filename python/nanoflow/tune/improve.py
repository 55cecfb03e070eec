"""Better orders of a program's tasks, by moving one at a time.

A period has a few dozen tasks at most, and each simulation takes about a millisecond: descent from
the natural order finds in seconds what an integer program over unrolled layers needs minutes for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from nanoflow.tune.program import Program

Order = tuple[tuple[int, int], ...]
T = TypeVar("T")


def repaired(program: Program, order: Order) -> Program | None:
    """The program in this order, tasks put behind those of the period they wait for.

    What can stay keeps its place. None when a task waits for one that only a later period issues.
    """
    ahead = dict(order)
    index = {task.name: i for i, task in enumerate(program.tasks)}
    before: dict[int, set[int]] = {}
    for i, task in enumerate(program.tasks):
        before[i] = set()
        for name, back in task.after:
            other = index[name]
            periods_later = ahead[other] - (ahead[i] - back)
            if periods_later < 0:
                return None
            if periods_later == 0:
                before[i].add(other)
    left = list(order)
    done: set[int] = set()
    result: list[tuple[int, int]] = []
    while left:
        ready = next((item for item in left if before[item[0]] <= done), None)
        if ready is None:
            return None
        left.remove(ready)
        done.add(ready[0])
        result.append(ready)
    return replace(program, order=tuple(result))


def neighbours(program: Program) -> Iterator[Program]:
    """Every order that differs by one task's place among those of its lane, or by its period."""
    order = program.order
    lane_of = [program.tasks[task].lane for task, _ in order]
    for i, (task, ahead) in enumerate(order):
        rest = order[:i] + order[i + 1 :]
        places = [j for j in range(len(order)) if lane_of[j] == lane_of[i] and j != i]
        candidates = [(j, ahead) for j in places]
        # To the front it belongs to this period's layer, to the back to the next one's.
        candidates += [(0, 0)] if ahead == 1 else [(len(rest), 1)]
        for place, period in candidates:
            moved = repaired(program, (*rest[:place], (task, period), *rest[place:]))
            if moved is not None and moved.order != order:
                yield moved


def improve(
    program: Program, evaluate: Callable[[Program], float], budget: int
) -> tuple[Program, float]:
    """The best order found from this one in `budget` evaluations, and its value.

    `evaluate` is to be made small. The order evaluated best whose neighbours have not been looked
    at is next: so the search leaves a hollow by its lowest pass.
    """
    value = evaluate(program)
    best = (value, program)
    seen = {program.order}
    heap = [(value, 0, program)]
    while heap:
        for candidate in neighbours(heapq.heappop(heap)[2]):
            if candidate.order in seen:
                continue
            if len(seen) >= budget:
                return best[1], best[0]
            value = evaluate(candidate)
            heapq.heappush(heap, (value, len(seen), candidate))
            seen.add(candidate.order)
            if value < best[0]:
                best = (value, candidate)
    return best[1], best[0]


def descend(
    settings: Mapping[str, T],
    choices: Mapping[str, Sequence[T]],
    evaluate: Callable[[Mapping[str, T]], float],
) -> tuple[dict[str, T], float]:
    """The best settings that changing one at a time leads to, and their value."""
    best, value = dict(settings), evaluate(settings)
    while True:
        start = value
        for name, values in choices.items():
            for choice in values:
                if choice == best[name]:
                    continue
                trial = {**best, name: choice}
                other = evaluate(trial)
                if other < value * (1 - 1e-6):
                    best, value = trial, other
        if value == start:
            return best, value
