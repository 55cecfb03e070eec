"""`nanoflow plan --trace`: a timeline that holds every op of every step once, lane by lane."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from conftest import DEVICES
from nanoflow.cli import main
from nanoflow.mixed_step import StepMix, deal_step
from nanoflow.plan_view import to_bar
from nanoflow.trace import TimedStep, trace_of
from tiny_models import write_tiny_llama

STEPS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(
        tmp_path_factory.mktemp("llama"), num_layers=3, hidden_size=256, dtype="bfloat16"
    )


def write(model: Path, path: Path, *flags: str) -> dict[str, Any]:
    arguments = ["--model", str(model), "--trace", str(path), "--steps", str(STEPS), *flags]
    assert main(["plan", *arguments]) == 0
    trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return trace


def rows_of(trace: dict[str, Any]) -> dict[str, int]:
    """The trace's rows by their names."""
    events = trace["traceEvents"]
    return {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}


def spans(trace: dict[str, Any], row: int) -> list[dict[str, Any]]:
    found = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == row]
    return sorted(found, key=lambda event: event["ts"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("schedule", ["sequential", "overlap"])
def test_a_trace_holds_every_op_once_and_lanes_take_turns(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    device: str,
    schedule: str,
) -> None:
    mix = ["--rows", "6", "--context", "40", "--prefill-rows", "30", "--schedule", schedule]
    trace = write(model, tmp_path / "trace.json", *mix, "--device", device)
    rows = rows_of(trace)
    assert list(rows) == ["steps", *trace["metadata"]["schedule"]["lanes"]]
    ops: Counter[tuple[int, int | None, str]] = Counter()
    steps = spans(trace, rows.pop("steps"))
    assert [step["name"] for step in steps] == [f"step {number}" for number in range(STEPS)]
    for row in rows.values():
        lane = spans(trace, row)
        for before, after in pairwise(lane):
            # To the nanosecond that both are rounded to.
            assert before["ts"] + before["dur"] <= after["ts"] + 2e-3
        for event in lane:
            step = steps[event["args"]["step"]]
            assert event["dur"] >= 0
            assert step["ts"] - 2e-3 <= event["ts"]
            assert event["ts"] + event["dur"] <= step["ts"] + step["dur"] + 2e-3
            ops[event["args"]["step"], event["args"].get("layer"), event["name"]] += 1
    assert steps[0]["ts"] == 0 and steps[1]["ts"] >= steps[0]["dur"]
    printed = capsys.readouterr().out.splitlines()
    labels = [match for line in printed if (match := re.search(r" layers\.1\.(\S+ \w+) ", line))]
    shown = Counter(label[1] for label in labels)
    plans = [line for line in printed if line.startswith("plan of schedule")]
    assert len(plans) == 2  # of the layers and of the head
    total = sum(int(line.split(": ")[1].split(" ops")[0]) for line in plans)
    for step in range(STEPS):
        ran = {name: n for (s, layer, name), n in ops.items() if (s, layer) == (step, 1)}
        assert shown and ran == shown
        assert sum(n for (s, _, _), n in ops.items() if s == step) == total
    assert trace["metadata"]["decodes"] == 6 and trace["metadata"]["prefill_rows"] == 30


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--prefill-rows", "-1"], "--rows 64 and --prefill-rows -1 must not be below 0"),
        (["--rows", "0"], "--rows 0 and --prefill-rows 0 must not be below 0, and at least 1"),
    ],
)
def test_sizes_that_make_no_step_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["plan", "--model", str(model), *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_step_is_dealt_as_the_scheduler_would() -> None:
    step = deal_step(StepMix(decodes=5, context=70, prefill_rows=300), [0.5])
    assert step.rows.tolist() == [1, 1, 1, 70, 70, 10, 1, 1, 70, 70, 10]
    assert step.kv_len.tolist() == [70, 70, 70, 70, 70, 10, 70, 70, 70, 70, 10]
    assert step.segment_requests.tolist() == [0, 6, 11]
    assert step.segment_rows == [153, 152]
    config = step.engine_config()
    assert (config.max_num_batched_tokens, config.max_num_seqs) == (305, 11)
    assert (config.max_model_len, config.num_pages) == (70, 9 * 2 + 2)
    only_prompts = deal_step(StepMix(decodes=0, context=8, prefill_rows=8), [])
    assert only_prompts.rows.tolist() == [8]


class Timing:
    """An op that ran on lane "all"."""

    def __init__(self, name: str, begin_us: float, end_us: float) -> None:
        self.name, self.begin_us, self.end_us = name, begin_us, end_us
        self.lane = "all"


def test_steps_share_a_clock() -> None:
    timings = [Timing("layers.0.qkv.1 gemm", 0, 4.5), Timing("head sample", 5, 6)]
    assert to_bar(timings[0]).part == 1
    steps = [TimedStep(1000.0, timings), TimedStep(1010.0, timings)]
    events = spans(trace_of(steps, ["all"], {}), 1)
    assert [(e["ts"], e["dur"], e["name"], e["cat"]) for e in events] == [
        (0, 4.5, "qkv.1 gemm", "qkv"),
        (5, 1, "head.0 sample", "head"),
        (10, 4.5, "qkv.1 gemm", "qkv"),
        (15, 1, "head.0 sample", "head"),
    ]
    assert events[0]["args"] == {"step": 0, "layer": 0}
    assert events[3]["args"] == {"step": 1}
