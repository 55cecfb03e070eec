"""Schedules by name or from JSON files. The format is told in csrc/pipeline/schedule.h."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoflow._core import EngineError, LaneSpec, Schedule, StageSpec

BUILT_IN = ("sequential", "nano", "overlap")
FOR_RANKS = ("tp-overlap",)  # built in, too
AUTO = "auto"  # chosen by nanoflow.tune.auto
_MEMORY_SHARE = 28 / 132  # of the device: what was fastest for Llama 8B on an H200
_NETWORK_SHARE = 16 / 132


def built_in_schedule(name: str, width: int) -> Schedule:
    """A schedule for a device of `width` threads or SMs.

    sequential: one op after the other, over all rows and the whole device.
    nano: the nano-batches of overlap, nothing beside anything: what they cost by themselves.
    overlap: attention of one half beside o, mlp and the next layer's qkv of the other half; the
        head on the whole device. Two threads, which cannot be shared out like that, take a half
        each, and attention in turn.
    tp-overlap: for several ranks, collectives beside all of that: qkv and attention of quarters, o
        and mlp of halves, the first of which gathers before o while the second reduces after it
        (NanoFlow, OSDI'25, section 4.2).
    Raises ValueError on another name.
    """
    if name == "sequential":
        return Schedule(name, [LaneSpec("all", width)])
    if name == "nano":
        return without_overlap(built_in_schedule("overlap", width), width)
    if name == "overlap":
        return _overlap(name, width) if width > 2 else _halves(name, width)
    if name == "tp-overlap":
        return _tensor_parallel_overlap(name, width)
    known = ", ".join((AUTO, *BUILT_IN, *FOR_RANKS))
    raise ValueError(f"schedule {name!r} is unknown; known: {known}, or a JSON file")


def _overlap(name: str, width: int) -> Schedule:
    memory = max(1, round(width * _MEMORY_SHARE))
    lanes = [LaneSpec("compute", max(1, width - memory)), LaneSpec("memory", memory)]
    lanes.append(LaneSpec("whole", width))
    compute, beside = StageSpec([0.5], "compute"), StageSpec([0.5], "memory")
    stages = {"qkv": compute, "attn": beside, "o": compute, "mlp": compute}
    order = ["o.0", "mlp.0", "qkv.0@+1", "o.1", "mlp.1", "qkv.1@+1"]
    return Schedule(name, lanes, stages | {"head": StageSpec([], "whole")}, order)


def _halves(name: str, width: int) -> Schedule:
    lanes = [LaneSpec("first", 1), LaneSpec("second", 1), LaneSpec("whole", width)]
    halves = [0.5], ["first", "second"]
    each, beside = StageSpec(*halves), StageSpec(*halves, in_turn=True)
    stages = {"qkv": each, "attn": beside, "o": each, "mlp": each}
    return Schedule(name, lanes, stages | {"head": StageSpec([], "whole")})


def without_overlap(schedule: Schedule, width: int) -> Schedule:
    """The same nano-batches on one lane, as wide as the device; its id is "nano"."""
    stages = {
        name: StageSpec(stage.split, "all", gather=stage.gather)
        for name, stage in schedule.stages.items()
    }
    return Schedule("nano", [LaneSpec("all", width)], stages)


def _tensor_parallel_overlap(name: str, width: int) -> Schedule:
    memory, network = (max(1, round(width * share)) for share in (_MEMORY_SHARE, _NETWORK_SHARE))
    lanes = [
        LaneSpec("compute", max(1, width - memory - network)),
        LaneSpec("memory", memory),
        LaneSpec("network", network),
        LaneSpec("whole", width),
    ]
    quarters = [0.25, 0.5, 0.75]
    stages = {
        "qkv": StageSpec(quarters, "compute"),
        "attn": StageSpec(quarters, "memory"),
        "o": StageSpec([0.5], "compute", "network", [0]),
        "mlp": StageSpec([0.5], "compute", "network"),
        "head": StageSpec([], "whole"),
    }
    order = ["o.0", "o.1", "mlp.0", "mlp.1", *(f"qkv.{part}@+1" for part in range(4))]
    return Schedule(name, lanes, stages, order)


def find_schedule(schedule: str | Path | Schedule, width: int) -> Schedule:
    """A built-in by its name, a file by its path, or the schedule itself.

    Raises ValueError on "auto", which stands for several: see nanoflow.tune.auto.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if not isinstance(schedule, str | Path):
        raise TypeError(f"schedule={schedule!r} must be a name, the path of a file or a Schedule")
    if schedule == AUTO:
        raise ValueError("schedule 'auto' is chosen by an LLM as it serves; name a schedule here")
    if schedule in (*BUILT_IN, *FOR_RANKS):
        return built_in_schedule(str(schedule), width)
    path = Path(schedule)
    if path.suffix != ".json" and not path.exists():
        return built_in_schedule(str(schedule), width)  # says which names there are
    return load_schedule(path)


def load_schedule(path: Path) -> Schedule:
    """Reads a file. Raises FileNotFoundError, or ValueError naming the file and what is wrong."""
    if not path.exists():
        raise FileNotFoundError(f"there is no schedule file {path}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    try:
        return schedule_from_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def schedule_from_json(content: Any) -> Schedule:
    """Raises ValueError naming the key that is unknown, missing or has a wrong value."""
    _check_object("the schedule", content, required=("id", "lanes"), optional=("stages", "order"))
    lanes, stages, order = content["lanes"], content.get("stages", {}), content.get("order", [])
    _check_object("'lanes'", lanes)
    _check_object("'stages'", stages)
    if not isinstance(content["id"], str):
        raise ValueError(f"'id' is {content['id']!r}, not a string")
    for name, width in lanes.items():
        if type(width) is not int:
            raise ValueError(f"the width of lane {name!r} is {width!r}, not an integer")
    if not isinstance(order, list) or not all(isinstance(item, str) for item in order):
        raise ValueError(f"'order' is {order!r}, not a list of strings")
    schedule = Schedule(
        content["id"],
        [LaneSpec(name, width) for name, width in lanes.items()],
        {name: _stage_from_json(name, stage) for name, stage in stages.items()},
        order,
    )
    try:
        schedule.check()
    except EngineError as error:
        raise ValueError(str(error)) from error
    return schedule


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    """What `schedule_from_json` reads."""
    return {
        "id": schedule.id,
        "lanes": {lane.name: lane.width for lane in schedule.lanes},
        "stages": {name: _stage_to_json(stage) for name, stage in schedule.stages.items()},
        "order": schedule.order,
    }


def _stage_to_json(stage: StageSpec) -> dict[str, Any]:
    lane = stage.lanes[0] if len(stage.lanes) == 1 else stage.lanes
    content: dict[str, Any] = {"split": stage.split, "lane": lane}
    if stage.reduce:
        content["reduce"] = stage.reduce
    if stage.gather:
        content["gather"] = stage.gather
    if stage.in_turn:
        content["in_turn"] = True
    return content


def _stage_from_json(name: str, stage: Any) -> StageSpec:
    what = f"stage {name!r}"
    _check_object(what, stage, optional=("split", "lane", "reduce", "gather", "in_turn"))
    split, lane = stage.get("split", []), stage.get("lane", [])
    lanes = [lane] if isinstance(lane, str) else lane
    reduce, gather = stage.get("reduce", ""), stage.get("gather", [])
    if not isinstance(split, list) or not all(type(cut) in (int, float) for cut in split):
        raise ValueError(f"'split' of {what} is {split!r}, not a list of fractions")
    if not isinstance(lanes, list) or not all(isinstance(name, str) for name in lanes):
        raise ValueError(f"'lane' of {what} is {lane!r}, not the name of a lane or a list of them")
    if not isinstance(reduce, str):
        raise ValueError(f"'reduce' of {what} is {reduce!r}, not the name of a lane")
    if not isinstance(gather, list) or not all(type(part) is int for part in gather):
        raise ValueError(f"'gather' of {what} is {gather!r}, not a list of part numbers")
    in_turn = stage.get("in_turn", False)
    if not isinstance(in_turn, bool):
        raise ValueError(f"'in_turn' of {what} is {in_turn!r}, not true or false")
    return StageSpec(split, lanes, reduce, gather, in_turn)


def _check_object(
    what: str,
    value: Any,
    *,
    required: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> None:
    """Any keys will do when none are named."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {value!r}, not a JSON object")
    known = required + optional
    if known and (unknown := [key for key in value if key not in known]):
        raise ValueError(f"{what} has an unknown key {unknown[0]!r}; known: {', '.join(known)}")
    if missing := [key for key in required if key not in value]:
        raise ValueError(f"{what} lacks the key {missing[0]!r}")
