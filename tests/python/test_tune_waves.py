"""Whole waves of tiles in predicted times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow import _core
from nanoflow.tune.costs import CostModel, Load
from nanoflow.tune.table import OpTable, shipped_table
from test_tune_search import llama_8b

GATE_UP = 28672, 4096


@pytest.fixture(scope="module")
def h200() -> OpTable:
    table = shipped_table("NVIDIA H200")
    assert table is not None
    return table


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


def test_a_product_of_nothing_is_refused() -> None:
    with pytest.raises(_core.EngineError, match="a product of 0 rows"):
        _core.cuda_gemm_us(0, 4096, 4096, 132)
