"""Timelines of steps as JSON that ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.plan_view import Timing, to_bar

_PROCESS = 1
_STEPS_ROW = 0  # above the lanes: when each step began and ended


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A step that ran; `begin_us` is on one clock for all steps, timings count from it."""

    begin_us: float
    timings: Sequence[Timing]


def trace_of(
    steps: Sequence[TimedStep], lanes: Sequence[str], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The trace events of steps in order: a row for the steps, then one for each lane.

    An event is an op, named without its layer so that equal ops share a colour; times are in
    microseconds from the first op of all. `metadata` is kept as it is.
    """
    rows = {lane: row for row, lane in enumerate(lanes, _STEPS_ROW + 1)}
    events = [_row_name(row, name) for name, row in [("steps", _STEPS_ROW), *rows.items()]]
    start = min(step.begin_us for step in steps)
    for number, step in enumerate(steps):
        begin = step.begin_us - start
        end = begin + max(timing.end_us for timing in step.timings)
        events.append(_event(f"step {number}", "step", _STEPS_ROW, begin, end, {}))
        for timing in step.timings:
            bar = to_bar(timing)
            name = f"{bar.stage}.{bar.part} {bar.op}"
            layer = {} if bar.layer is None else {"layer": bar.layer}
            events.append(
                _event(
                    name,
                    bar.stage,
                    rows[bar.lane],
                    begin + bar.begin_us,
                    begin + bar.end_us,
                    {"step": number, **layer},
                )
            )
    return {"traceEvents": events, "displayTimeUnit": "ns", "metadata": dict(metadata)}


def write_trace(trace: Mapping[str, Any], path: Path) -> None:
    """Writes an event a line."""
    rest = {key: value for key, value in trace.items() if key != "traceEvents"}
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in trace["traceEvents"])
    path.write_text(f'{json.dumps(rest)[:-1]}, "traceEvents": [\n{lines}\n]}}\n', encoding="utf-8")


def _row_name(row: int, name: str) -> dict[str, Any]:
    return {
        "ph": "M",
        "name": "thread_name",
        "pid": _PROCESS,
        "tid": row,
        "args": {"name": name},
    }


def _event(
    name: str, category: str, row: int, begin: float, end: float, args: Mapping[str, Any]
) -> dict[str, Any]:
    """A complete event: it has a begin and a duration, to the nanosecond."""
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": _PROCESS,
        "tid": row,
        "ts": round(begin, 3),
        "dur": round(end - begin, 3),
        "args": dict(args),
    }
