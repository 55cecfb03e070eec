"""Whole waves of tiles in predicted times, and the steps measured of five workloads on H200s."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import mean

import pytest

from nanoflow import _core
from nanoflow.schedule import BUILT_IN, built_in_schedule
from nanoflow.tune.costs import CostModel, Load
from nanoflow.tune.search import ping_pong
from nanoflow.tune.table import OpTable
from roofline import loads_of
from test_tune_search import llama_8b

ABLATIONS = Path(__file__).parents[2] / "bench" / "results" / "h200" / "ablations"
GATE_UP = 28672, 4096
CONTEXTS = {  # keys that a decode and a prompt's row read, in the mean of the workload's requests
    "512x512": (768, 256),
    "512x1024-auto": (1024, 256),
    "1024x512": (1280, 512),
    "sharegpt": (513, 741),
    "sharegpt-again": (513, 741),
    "sharegpt-auto": (513, 741),
    "lmsys": (301, 191),
    "lmsys-again": (301, 191),
    "lmsys-auto": (301, 191),
}
# What searches had chosen: counts of parts, width of attention's lane. On 40 SMs, and in quarters,
# attention was never measured alone.
SEARCHED = {"1024x512": ("2222", 32), "512x1024-auto": ("2422", 40)}


def test_products_on_a_gpu_take_whole_waves(h200: OpTable) -> None:
    """5 x 112 tiles of gate and up are 6 waves on 96 SMs and would be 7 on 92."""
    us = {
        (rows, sms): h200.product(rows, *GATE_UP, sms).us
        for rows in (640, 704, 768)
        for sms in (92, 96)
    }
    assert us[640, 96] < 0.93 * us[640, 92]
    assert us[704, 96] == pytest.approx(us[768, 96], rel=0.02)
    assert us[704, 96] > 1.1 * us[640, 96]
    plain = replace(h200, kernels="")
    assert plain.product(704, *GATE_UP, 96).us < 1.1 * plain.product(640, *GATE_UP, 96).us


def test_what_was_measured_is_predicted_as_measured(h200: OpTable) -> None:
    for product in h200.products:
        for entry in product.entries:
            clock = entry.mhz / h200.max_mhz
            cost = h200.product(
                round(entry.size), product.features, product.depth, entry.width, clock
            )
            assert cost.us == pytest.approx(entry.us)


def test_energy_of_a_product_knows_no_waves(h200: OpTable) -> None:
    for rows in (640, 704, 1300):
        plain = replace(h200, kernels="").product(rows, *GATE_UP, 96)
        assert h200.product(rows, *GATE_UP, 96).joules == plain.joules


def test_rows_are_padded_as_the_engine_pads_them(h200: OpTable) -> None:
    assert [_core.padded_rows(rows, 64) for rows in (1, 64, 1000, 1025, 2049)] == [
        *(64, 64, 1024, 1152, 2304)
    ]
    model = CostModel(h200, llama_8b())
    for stage in ("qkv", "o", "mlp"):
        costs = [model.stage(stage, 0.5, 132, Load(rows, 1024)) for rows in (1281, 1300, 1408)]
        assert costs[0] == costs[1] == costs[2]
        assert model.stage(stage, 0.5, 132, Load(1280, 1024)).us < costs[0].us
    reads = [model.stage("attn", 0.5, 132, Load(rows, 1024)).us for rows in (1300, 1408)]
    assert reads[0] < reads[1]  # which keys there are, whatever the padding


def test_short_attention_takes_as_long_to_start_and_end(h200: OpTable) -> None:
    """Of the two sizes measured, the greater reads twice as much in less than twice the time."""
    sizes = sorted({entry.size for entry in h200.decode})
    for width in (24, 32, 132):
        measured = [h200.attention(size, 0, width).us for size in sizes]
        halves = 2 * h200.attention(sizes[0] / 2, 0, width).us
        assert halves - measured[0] == pytest.approx(2 * measured[0] - measured[1], rel=0.1)
        assert halves - measured[0] > 15


def test_a_product_of_nothing_is_refused() -> None:
    with pytest.raises(_core.EngineError, match="a product of 0 rows"):
        _core.cuda_gemm_us(0, 4096, 4096, 132)


def steps_of(table: OpTable, workload: str) -> dict[str, tuple[float, float]]:
    """Milliseconds of a step by schedule: predicted, measured."""
    model = CostModel(table, llama_8b())
    runs = json.loads((ABLATIONS / f"{workload}.json").read_text())["runs"]
    schedules = [built_in_schedule(name, table.width) for name in BUILT_IN if name in runs]
    if workload in SEARCHED:
        counts, memory = SEARCHED[workload]
        schedules.append(ping_pong(memory, table.width, [int(count) for count in counts]))
    found = {}
    for schedule in schedules:
        run = runs[schedule.id]
        predicted = sum(
            share * model.predict(schedule, load).step_us
            for share, load in loads_of(run, CONTEXTS[workload])
        )
        found[schedule.id] = predicted / 1e3, run["step_ms"]
    return found


@pytest.mark.parametrize("workload", CONTEXTS)
def test_steps_of_five_workloads_are_predicted_as_measured(h200: OpTable, workload: str) -> None:
    """Each was measured on another GPU, of which some are 5 % slower: all of its schedules come
    out within 7 %, and beside each other within 2 %; 4 % of lmsys, whose steps often lack the
    prompts for a whole tile.

    As first measured, the built-in schedules within 5 %; 8 % where the lanes are not those that
    were measured, and of halves of lmsys."""
    found = steps_of(h200, workload)
    off = {name: log(predicted / us) for name, (predicted, us) in found.items()}
    gpu = mean(off.values())
    assert abs(gpu) < 0.07
    for ratio in off.values():
        assert abs(ratio - gpu) < (0.04 if workload.startswith("lmsys") else 0.02)
    for name, (predicted, measured) in found.items():
        is_known = name in BUILT_IN and not (name == "nano" and workload.startswith("lmsys"))
        if not workload.endswith("-again"):
            assert predicted == pytest.approx(measured, rel=0.05 if is_known else 0.08)


@pytest.mark.parametrize(
    ("workload", "pays"),
    [("512x512", True), ("1024x512", True), ("512x1024-auto", True), ("lmsys", False)],
)
def test_overlap_is_predicted_to_pay_where_it_does(
    h200: OpTable, workload: str, pays: bool
) -> None:
    """Not of sharegpt: what is measured, 1 %, is less than predictions are good for."""
    found = steps_of(h200, workload)
    for times in zip(*found.values(), strict=True):  # predicted, then measured
        by_name = dict(zip(found, times, strict=True))
        assert min(by_name, key=by_name.__getitem__).startswith("overlap") == pays
        assert by_name["nano"] > 1.01 * by_name["sequential"]
