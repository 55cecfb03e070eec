"""Schedules by name and from files, and what a wrong file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoflow import _core
from nanoflow.schedule import (
    BUILT_IN,
    FOR_RANKS,
    built_in_schedule,
    find_schedule,
    load_schedule,
    schedule_to_json,
)

PING_PONG = {
    "id": "mine",
    "lanes": {"compute": 3, "memory": 1},
    "stages": {
        "qkv": {"split": [0.5], "lane": "compute"},
        "attn": {"split": [0.25, 0.5], "lane": "memory"},
    },
    "order": ["qkv.0", "qkv.1", "o.0", "mlp.0"],
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "schedule.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("name", [*BUILT_IN, *FOR_RANKS])
@pytest.mark.parametrize("width", [1, 2, 8, 132])
def test_built_in_schedules_are_sound_and_fit(name: str, width: int, tmp_path: Path) -> None:
    schedule = built_in_schedule(name, width)
    schedule.check()
    assert schedule.id == name
    beside = [lane.width for lane in schedule.lanes if lane.name != "whole"]
    assert sum(beside) == max(width, len(beside))
    quarters = [0.25, 0.5, 0.75]
    assert schedule.cuts() == {"sequential": [], "tp-overlap": quarters}.get(name, [0.5])
    assert load_schedule(write(tmp_path, schedule_to_json(schedule))) == schedule


def test_widths_of_the_overlap() -> None:
    widths = {w: [lane.width for lane in built_in_schedule("overlap", w).lanes] for w in (2, 132)}
    assert widths == {2: [1, 1, 2], 132: [104, 28, 132]}


def test_attention_has_a_lane_of_its_own() -> None:
    stages = built_in_schedule("overlap", 132).stages
    assert [name for name, stage in stages.items() if stage.lanes == ["memory"]] == ["attn"]


def test_each_of_two_threads_takes_a_half() -> None:
    schedule = built_in_schedule("overlap", 2)
    assert [name for name, stage in schedule.stages.items() if stage.in_turn] == ["attn"]
    for stage in ("qkv", "attn", "o", "mlp"):
        lanes = [schedule.lanes[schedule.lane_of(stage, part)].name for part in range(2)]
        assert lanes == ["first", "second"]


def test_a_file_becomes_a_schedule(tmp_path: Path) -> None:
    schedule = find_schedule(str(write(tmp_path, PING_PONG)), 4)
    assert schedule.id == "mine"
    assert [(lane.name, lane.width) for lane in schedule.lanes] == [("compute", 3), ("memory", 1)]
    assert schedule.stages["attn"].split == [0.25, 0.5]
    assert schedule.cuts() == [0.25, 0.5]
    assert schedule.order == PING_PONG["order"]


def test_a_schedule_stands_for_itself() -> None:
    schedule = _core.Schedule("x", [_core.LaneSpec("a", 1)])
    assert find_schedule(schedule, 2) is schedule
    with pytest.raises(TypeError, match="schedule=3 must be"):
        find_schedule(3, 2)  # type: ignore[arg-type]


def test_an_unknown_name_or_file() -> None:
    with pytest.raises(ValueError, match="'pingpong' is unknown; known: auto, sequential, nano,"):
        find_schedule("pingpong", 2)
    with pytest.raises(ValueError, match="'auto' is chosen by an LLM as it serves"):
        find_schedule("auto", 2)
    with pytest.raises(FileNotFoundError, match=r"no schedule file .*gone\.json"):
        find_schedule("gone.json", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lane": {}}, "the schedule has an unknown key 'lane'; known: id, lanes, stages, order"),
        ({"id": None}, "'id' is None, not a string"),
        ({"lanes": ["compute"]}, "'lanes' is .*, not a JSON object"),
        ({"lanes": {"compute": 1.5}}, "the width of lane 'compute' is 1.5, not an integer"),
        ({"lanes": {}}, "no lanes"),
        ({"stages": {"qkv": {"splits": [0.5]}}}, "stage 'qkv' has an unknown key 'splits'"),
        ({"stages": {"qkv": [0.5]}}, "stage 'qkv' is .*, not a JSON object"),
        ({"stages": {"qkv": {"split": "half"}}}, "'split' of stage 'qkv' is 'half'"),
        ({"stages": {"qkv": {"split": [0.5, 0.5]}}}, "qkv"),
        ({"stages": {"qkv": {"lane": 1}}}, "'lane' of stage 'qkv' is 1"),
        ({"stages": {"qkv": {"lane": "gpu"}}}, "gpu"),
        ({"stages": {"qkv": {"lane": ["compute", 1]}}}, r"'lane' of stage 'qkv' is \['compute', 1"),
        ({"stages": {"o": {"lane": ["compute", "memory"]}}}, "o has 1 parts but 2 lanes"),
        ({"stages": {"norm": {}}}, "norm"),
        ({"stages": {"o": {"reduce": 2}}}, "'reduce' of stage 'o' is 2, not the name of a lane"),
        ({"stages": {"o": {"reduce": "net"}}}, "no lane named 'net'"),
        ({"stages": {"qkv": {"reduce": "memory"}}}, "stage qkv has no collectives to run"),
        (
            {"stages": {"o": {"reduce": "memory"}, "mlp": {"reduce": "compute"}}},
            "collectives run on the lanes 'compute' and 'memory', but",
        ),
        ({"stages": {"o": {"gather": 0}}}, "'gather' of stage 'o' is 0, not a list of part"),
        ({"stages": {"o": {"gather": [1]}}}, "part 1 of stage o gathers, but there are 1 parts"),
        ({"stages": {"mlp": {"gather": [0]}}}, "stage mlp has parts that gather; only those"),
        ({"stages": {"attn": {"in_turn": 1}}}, "'in_turn' of stage 'attn' is 1, not true or"),
        ({"order": "qkv.0"}, "'order' is 'qkv.0', not a list of strings"),
        ({"order": ["qkv.7"]}, "qkv.7"),
        ({"order": ["qkv.0"]}, "order"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, PING_PONG | changes)
    with pytest.raises(ValueError, match=message) as raised:
        load_schedule(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_missing_keys_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the schedule lacks the key 'lanes'"):
        load_schedule(write(tmp_path, {"id": "x"}))
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_schedule(write(tmp_path, "{"))
    with pytest.raises(ValueError, match="the schedule is 3, not a JSON object"):
        load_schedule(write(tmp_path, "3"))
