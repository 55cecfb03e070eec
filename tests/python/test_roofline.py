"""What energy allows, beside what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanoflow.schedule import built_in_schedule
from nanoflow.tune.costs import CostModel, Load
from nanoflow.tune.search import search
from nanoflow.tune.table import OpTable
from roofline import loads_of, roofline_us, row_of
from test_tune_search import llama_8b

ABLATIONS = Path(__file__).parents[2] / "bench" / "results" / "h200" / "ablations"
LOAD = Load(1024, 768, 1024, 256)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ABLATIONS / "512x512.json").read_text())
    return content


def test_no_schedule_is_predicted_to_take_less(h200: OpTable) -> None:
    bound = roofline_us(h200, llama_8b(), LOAD)
    model = CostModel(h200, llama_8b())
    best = search(model, LOAD, 2)[0].prediction.step_us
    sequential = model.predict(built_in_schedule("sequential", h200.width), LOAD).step_us
    assert 0.8 * best < bound < best < sequential
    # More power is not what limits a step at full clock: the products are.
    plenty = replace(h200, cap_watts=10_000.0)
    products = sum(model.stage(stage, 1.0, h200.width, LOAD).us for stage in ("qkv", "o", "mlp"))
    head = model.head(built_in_schedule("sequential", h200.width), LOAD).us
    assert roofline_us(plenty, llama_8b(), LOAD) == pytest.approx(32 * products + head)
    with pytest.raises(ValueError, match="do not say what limits its power"):
        roofline_us(replace(h200, cap_watts=0.0), llama_8b(), LOAD)


def test_loads_hold_a_run_s_rows(result: dict[str, Any]) -> None:
    for run in result["runs"].values():
        window, loads = run["steady_state"], loads_of(run)
        rows = (window["output_tokens"] + window["prompt_tokens"]) / window["steps"]
        assert sum(share * load.rows for share, load in loads) == pytest.approx(rows, abs=1)
        assert all(load.context == 768 and load.prefill_context == 256 for _, load in loads)


def test_overlap_is_nearer_to_what_energy_allows(result: dict[str, Any]) -> None:
    row = row_of(result)
    parts = {
        name: (int(energy), int(compute))
        for name, energy, compute in re.findall(r"(\w+): [\d.]+, (\d+)%, (\d+)%", row)
    }
    assert parts.keys() >= {"sequential", "nano", "overlap"}
    assert parts["nano"] < parts["sequential"] < parts["overlap"] < (100, 100)


def test_what_op_times_say_nothing_of_is_refused(result: dict[str, Any]) -> None:
    unknown = {"runs": {"sequential": {**result["runs"]["sequential"], "gpu": "another"}}}
    with pytest.raises(ValueError, match="no op times of another"):
        row_of({**result, **unknown})
    experts = json.loads((ABLATIONS / "mixtral-8x7b.json").read_text())
    with pytest.raises(ValueError, match="mixtral-8x7b is shared by GPUs or has experts"):
        row_of(experts)
