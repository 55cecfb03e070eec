"""The schedules that a device's table says are fastest for a load.

The space is that of periodic schedules with attention on a lane of its own: into how many
nano-batches each stage is cut and where, how the device is parted between the lanes, and in which
order the parts are issued. Structures are tried out exhaustively, the orders of the best ones by
`improve`. To run everything in turn on the whole device is always a candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from nanoflow._core import LaneSpec, Schedule, StageSpec
from nanoflow.schedule import built_in_schedule
from nanoflow.tune.costs import CostModel, Load, Prediction
from nanoflow.tune.improve import descend, improve, repaired
from nanoflow.tune.program import STAGES, Program, parts_of, program_of

WHOLE, COMPUTE, MEMORY = "all", "compute", "memory"  # lanes
_COUNTS = (1, 2, 4)  # nano-batches of a stage; cuts of fewer are cuts of more
_ROWS = 64  # the first cut falls on a multiple: what a bucket of rows is made of
_CUTS = (0.35, 0.65)  # between which it is moved
_FINALISTS = 6  # structures whose orders are improved
_ORDERS = 60  # evaluated for each of them
_NEAR = 1.1  # times what the fastest takes: as far as predictions may be wrong
# Of a step: what each part of a stage beyond two costs that is not predicted. Mistral-7B on an H200
# with attention in quarters was predicted to take 0.5 % less than in halves, and took 0.4 % more.
MORE_PARTS = 0.004


@dataclass(frozen=True, slots=True)
class Candidate:
    schedule: Schedule
    prediction: Prediction


@dataclass(frozen=True, slots=True)
class _Structure:
    counts: tuple[int, ...]  # nano-batches of STAGES
    starts: bool  # in ping-pong, or else each stage in turn


def search(model: CostModel, load: Load, count: int = 5) -> list[Candidate]:
    """The `count` best, the fastest first: the best one of each width of the lane of attention, as
    far as those come near the fastest, then of each structure. Sequential is among them, last if
    nowhere else."""
    width = model.table.width
    sequential = _candidate(model, built_in_schedule("sequential", width), load)
    found: list[tuple[float, _Structure, int]] = []
    for structure in _structures():
        for memory in memory_widths(width, model.table.width_step)[::2]:  # all, for the best ones
            schedule = _schedule(structure, 0.5, memory, width)
            if schedule is not None:
                found.append((model.predict(schedule, load).step_us, structure, memory))
    found.sort(key=lambda item: item[0])
    candidates: dict[tuple[tuple[int, ...], int], Candidate] = {}  # by structure and width
    seen: set[tuple[int, ...]] = set()
    for _, structure, memory in found:
        if structure.counts not in seen and len(seen) < _FINALISTS:
            seen.add(structure.counts)
            for at, candidate in _improved(model, load, structure, memory).items():
                candidates[structure.counts, at] = candidate
    best = _varied(candidates, count - 1)
    return sorted([*best, sequential], key=_rank)


def _varied(
    candidates: Mapping[tuple[tuple[int, ...], int], Candidate], count: int
) -> list[Candidate]:
    ranked = sorted(candidates, key=lambda key: _rank(candidates[key]))
    limit = _NEAR * _rank(candidates[ranked[0]]) if ranked else 0.0
    near = [key for key in ranked if _rank(candidates[key]) <= limit]
    of_width = list({at: (counts, at) for counts, at in reversed(near)}.values())
    of_structure = list({counts: (counts, at) for counts, at in reversed(ranked)}.values())
    order = [key for group in (of_width, of_structure) for key in sorted(group, key=ranked.index)]
    return [candidates[key] for key in list(dict.fromkeys(order))[:count]]


def memory_widths(width: int, step: int) -> list[int]:
    """Of the lane of attention, from `step` to half of the device. It or the rest of the device is
    a multiple of `step`: a GPU parts its SMs in groups and leaves the remainder to one lane."""
    widths = range(step, max(step, width // 2) + 1) if width >= 2 * step else []
    return [one for one in widths if one % step == 0 or (width - one) % step == 0]


def _structures() -> Iterator[_Structure]:
    for counts in (*product(_COUNTS, repeat=len(STAGES)), (3,) * len(STAGES)):
        if counts[STAGES.index("attn")] > 1:
            yield _Structure(counts, starts=False)
            yield _Structure(counts, starts=True)


def _improved(
    model: CostModel, load: Load, structure: _Structure, memory: int
) -> dict[int, Candidate]:
    """The structure with the best order found, on lanes of all widths with the best cut for the
    best of them."""
    table = model.table
    start = _schedule(structure, 0.5, memory, table.width)
    assert start is not None
    program, _ = improve(
        program_of(start), lambda p: model.predict(start, load, p).step_us, _ORDERS
    )

    def build(settings: Mapping[str, float]) -> Schedule:
        schedule = parted(structure.counts, settings["cut"], round(settings["memory"]), table.width)
        return ordered(schedule, program)

    widths = memory_widths(table.width, table.width_step)
    settings, _ = descend(
        {"cut": 0.5, "memory": float(memory)},
        {"memory": [float(w) for w in widths], "cut": _first_cuts(load.rows)},
        lambda settings: model.predict(build(settings), load).step_us,
    )
    return {w: _candidate(model, build({**settings, "memory": w}), load) for w in widths}


def _candidate(model: CostModel, schedule: Schedule, load: Load) -> Candidate:
    return Candidate(schedule, model.predict(schedule, load))


def _rank(candidate: Candidate) -> float:
    stages = candidate.schedule.stages.values()
    more = sum(max(0, len(stage.split) - 1) for stage in stages)
    return candidate.prediction.step_us * (1 + MORE_PARTS * more)


def _first_cuts(rows: int) -> list[float]:
    fractions = [multiple / rows for multiple in range(_ROWS, rows, _ROWS)]
    return [0.5, *(f for f in fractions if _CUTS[0] <= f <= _CUTS[1] and f != 0.5)]


def _split(count: int, cut: float) -> list[float]:
    if count == 3:
        return [1 / 3, 2 / 3]
    return {1: [], 2: [cut], 4: [cut / 2, cut, (1 + cut) / 2]}[count]


def parted(counts: Sequence[int], cut: float, memory: int, width: int) -> Schedule:
    """Each stage in turn, attention on its own lane, the head on the whole device."""
    stages = {
        stage: StageSpec(_split(count, cut), MEMORY if stage == "attn" else COMPUTE)
        for stage, count in zip(STAGES, counts, strict=True)
    }
    lanes = [LaneSpec(COMPUTE, width - memory), LaneSpec(MEMORY, memory), LaneSpec(WHOLE, width)]
    name = f"overlap-{''.join(map(str, counts))}-{width - memory}+{memory}"
    return Schedule(name, lanes, {**stages, "head": StageSpec([], WHOLE)})


def ping_pong(memory: int, width: int, counts: Sequence[int] = (2,) * len(STAGES)) -> Schedule:
    """Two halves: attention of one beside all else of the other. `counts`: parts of each stage."""
    schedule = _schedule(_Structure(tuple(counts), starts=True), 0.5, memory, width)
    assert schedule is not None
    return schedule


def _schedule(structure: _Structure, cut: float, memory: int, width: int) -> Schedule | None:
    schedule = parted(structure.counts, cut, memory, width)
    if not structure.starts:
        return schedule
    program = _ping_pong(schedule)
    return None if program is None else ordered(schedule, program)


def _ping_pong(schedule: Schedule) -> Program | None:
    """All of one nano-batch, up to the next layer's attention, then all of the next one."""
    program = program_of(schedule)
    parts = parts_of(schedule)
    turn = ("o", "mlp", "qkv", "attn")
    order = sorted(
        ((i, int(part.stage in ("qkv", "attn"))) for i, part in enumerate(parts)),
        key=lambda item: (parts[item[0]].begin, turn.index(parts[item[0]].stage)),
    )
    return repaired(program, tuple(order))


def ordered(schedule: Schedule, program: Program) -> Schedule:
    """The schedule, issued in the order of a program of its tasks."""
    order = [program.tasks[task].name + "@+1" * ahead for task, ahead in program.order]
    return Schedule(schedule.id, schedule.lanes, schedule.stages, order)
