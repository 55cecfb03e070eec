"""Predictions of whole steps, calibrated by steps that were measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoflow import _core
from nanoflow.schedule import built_in_schedule, schedule_from_json, schedule_to_json
from nanoflow.tune.calibrate import calibrated
from nanoflow.tune.costs import CostModel, Load, shape_of
from nanoflow.tune.search import ping_pong
from nanoflow.tune.table import MeasuredStep, OpTable, load_table
from test_tune_search import llama_8b

TUNED = Path(__file__).parents[2] / "bench" / "results" / "h200" / "tune.json"
LOAD = Load(512, 768, 512, 256)


def predicted(table: OpTable, steps: Iterable[MeasuredStep]) -> dict[str, float]:
    """Over what was measured, by the schedule's name."""
    return {
        step.schedule["id"]: CostModel(table, SimpleNamespace(**step.model))  # type: ignore[arg-type]
        .predict(schedule_from_json(step.schedule), Load(**step.load))
        .step_us
        / step.us
        for step in steps
    }


def beside_sequential(ratios: dict[str, float]) -> dict[str, float]:
    """How far off the gain of each schedule is."""
    sequential = ratios["sequential"]
    return {name: ratio / sequential for name, ratio in ratios.items() if name != "sequential"}


def test_steps_tell_what_ops_did_not(h200: OpTable) -> None:
    """Made up by one table, and predicted by another that knows the same ops."""
    truth = replace(
        h200,
        energy_exponent=1.1,
        slowdown={("memory", "compute"): 1.1, ("compute", "memory"): 0.95},
    )
    model = CostModel(truth, llama_8b())

    def measured(schedule: _core.Schedule) -> MeasuredStep:
        us = model.predict(schedule, LOAD).step_us
        return MeasuredStep(shape_of(llama_8b()), schedule_to_json(schedule), asdict(LOAD), us)

    steps = tuple(measured(ping_pong(width, 132)) for width in (16, 20, 24, 28, 32, 40))
    sequential = [measured(built_in_schedule("sequential", 132))]
    wrong = replace(
        h200,
        energy_exponent=0.9,
        slowdown={("memory", "compute"): 1.2, ("compute", "memory"): 1.05},
        steps=steps,
    )
    assert max(predicted(wrong, steps).values()) > 1.04
    found = predicted(calibrated(wrong, llama_8b()), [*steps, *sequential])
    assert list(found.values()) == pytest.approx([1.0] * len(found), abs=0.01)


def test_without_steps_nothing_changes(h200: OpTable) -> None:
    table = replace(h200, steps=())
    found = calibrated(table, llama_8b())
    assert found.energy_exponent == pytest.approx(table.energy_exponent)
    assert dict(found.slowdown) == pytest.approx(dict(table.slowdown))


def test_a_tuned_h200_predicts_what_another_one_measured(h200: OpTable) -> None:
    """The ops of the one, calibrated by its halves in ping-pong alone, beside the other's steps of
    twice as many rows."""
    table = load_table(TUNED)
    own = table.steps
    halves = tuple(step for step in own if step.schedule["id"] != "sequential")
    assert len(halves) == 5
    found = calibrated(replace(table, steps=halves), llama_8b())
    for steps, before, after in ((own, 0.08, 0.04), (h200.steps, 0.04, 0.015)):
        gains = beside_sequential(predicted(table, steps))
        assert max(gains.values()) > 1 + before
        gains = beside_sequential(predicted(found, steps))
        assert list(gains.values()) == pytest.approx([1.0] * len(gains), abs=after)
