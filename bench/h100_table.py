"""Makes the op table of the H100 from the kernel results of bench/results/h100.

Those time products on all SMs only. How they slow down on fewer SMs is taken from sustained runs
of the four products of a layer together (µs at 1024 and 640 rows), with the clock that a part of
the device keeps at the power cap; prefill attention, which computes, is scaled with the SMs.

Usage: python bench/h100_table.py
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanoflow.tune.costs import Load
from nanoflow.tune.table import Entry, MeasuredStep, OpTable, Product, save_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "h100"
OUT = ROOT / "python" / "nanoflow" / "tune" / "tables" / "h100.json"
SMS = 132
MAX_MHZ = 1980.0
IDLE_WATTS, CAP_WATTS = 116.0, 695.0
ENERGY_EXPONENT = 0.77  # measured on an H200, which has the same die
LAYER_US = {  # rows: SMs: the four products
    640: {132: 447, 116: 462, 108: 500, 100: 512, 92: 534, 84: 541},
    1024: {132: 699, 116: 711, 108: 757, 100: 765, 92: 828, 84: 862},
}
CLOCK_GAIN = 0.068 / 24  # of the clock at the cap, for each SM less: 1413 MHz on 108, 1323 on 132
HALVES = {stage: {"split": [0.5], "lane": "compute"} for stage in ("qkv", "o", "mlp")}
SCHEDULES = {  # the built-in ones of that time
    "sequential": {"id": "sequential", "lanes": {"all": SMS}},
    "overlap": {
        "id": "overlap",
        "lanes": {"compute": 108, "memory": 24},
        "stages": {**HALVES, "attn": {"split": [0.5], "lane": "memory"}},
        "order": ["o.0", "mlp.0", "qkv.0@+1", "o.1", "mlp.1", "qkv.1@+1"],
    },
}
MODEL = {  # Llama-3.1-8B
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
GATE_UP = 28672, 4096  # fused with its activation
KV_BYTES, HEADS = 4096, 4096  # of a token in a layer; query heads x head_dim
ROW_WORK_GB_S, ROW_WORK_WATTS = 2500, 450  # norms and rotation read what was just written


def slowing(rows: int, width: int) -> float:
    """Time on so many SMs over that on all."""
    few, many = (LAYER_US[r][width] / LAYER_US[r][SMS] for r in (640, 1024))
    part = min(1.0, max(0.0, (rows - 640) / (1024 - 640)))
    return few + (many - few) * part


def products(results: list[dict[str, Any]]) -> tuple[Product, ...]:
    shapes: dict[tuple[int, int], list[Entry]] = {}
    for result in results:
        run = result.get("fused", result["nanoflow"])  # as the engine runs it
        for width in sorted(LAYER_US[1024]):
            entry = Entry(
                size=result["rows"],
                width=width,
                us=run["us"] * slowing(result["rows"], width),
                watts=run["watts"],
                mhz=min(MAX_MHZ, run["sm_mhz"] * (1 + CLOCK_GAIN * (SMS - width))),
            )
            shapes.setdefault((result["N"], result["K"]), []).append(entry)
    return tuple(
        Product(n, k, tuple(entries), is_general=(n, k) == GATE_UP)
        for (n, k), entries in shapes.items()
    )


def decode(results: list[dict[str, Any]]) -> tuple[Entry, ...]:
    size = 512 * 768 * KV_BYTES
    return tuple(
        Entry(size, r["sms"], run["us"], run["watts"], run["sm_mhz"])
        for r in results
        if r["case"] == "512 decodes of 768" and r["page_size"] == 16
        for run in [r["sustained"]]
    )


def prefill(results: list[dict[str, Any]]) -> tuple[Entry, ...]:
    """Rows read half of their prompt's keys on the average."""
    lengths = {"prefill 512": (512, 512), "prefill 4 of 512": (2048, 512)}
    entries = []
    for result in results:
        if result["case"] in lengths and result["page_size"] == 64:
            rows, prompt = lengths[result["case"]]
            flops = 4 * rows * prompt / 2 * HEADS
            for width in (132, 64, 32, 16):
                us = result["us"] * SMS / width
                watts = IDLE_WATTS + (CAP_WATTS - IDLE_WATTS) * width / SMS
                entries.append(Entry(flops, width, us, watts, MAX_MHZ))
    return tuple(entries)


def row_work() -> tuple[Entry, ...]:
    return tuple(
        Entry(moved, SMS, 2.0 + moved / (ROW_WORK_GB_S * 1e3), ROW_WORK_WATTS, MAX_MHZ)
        for moved in (1e4, 1e8)
    )


def steps() -> tuple[MeasuredStep, ...]:
    """The steady states of two runs with these kernels, about 500 requests decoding."""
    measured = []
    for name in ("sequential", "overlap"):
        run = json.loads((RESULTS / f"512x512-{name}.json").read_text())
        window = run["steady_state"]["window"]
        rows = round(window["tokens"] / window["steps"])
        load = Load(500, 768, rows - 500, 256)
        schedule = SCHEDULES[name]
        us = window["seconds"] / window["steps"] * 1e6
        measured.append(MeasuredStep(MODEL, schedule, asdict(load), us))
    return tuple(measured)


def main() -> None:
    gemm = json.loads((RESULTS / "cuda-gemm.json").read_text())
    attention = json.loads((RESULTS / "cuda-attention.json").read_text())["results"]
    table = OpTable(
        device=gemm["gpu"],
        width=SMS,
        width_step=8,
        idle_watts=IDLE_WATTS,
        cap_watts=CAP_WATTS,
        max_mhz=MAX_MHZ,
        products=products(gemm["results"]),
        decode=decode(attention),
        prefill=prefill(attention),
        rows=row_work(),
        steps=steps(),
        energy_exponent=ENERGY_EXPONENT,
        row_granularity=64,
        kernels="cuda",
        origin={
            "command": "python bench/h100_table.py",
            "from": "bench/results/h100/cuda-gemm.json, cuda-attention.json",
            "note": "products on parts of the device, prefill on parts and row work are estimates",
        },
    )
    save_table(table, OUT)
    print(OUT)


if __name__ == "__main__":
    main()
