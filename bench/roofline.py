"""How near schedules come to what energy and arithmetic allow, from results of `bench throughput`.

    python bench/roofline.py bench/results/h200/ablations/512x512.json
    python bench/roofline.py bench/results/h200/ablations/sharegpt.json --keys 513 741

Under a power limit a step lasts as long as its energy takes. The energy roofline is a step that
does everything once and uncut, with attention hidden: at the clock at which all the rest ends just
when the power above idle has been used up, or at the full one. Its energies and times are those of
the op tables in the package. Prints of each schedule the tokens a joule, which part its step is of
that, and which part the products done a second are of what one large product reaches alone in the
same run, where that was measured (Compute / 2P in the NanoFlow paper).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoflow import _core
from nanoflow.loading import open_checkpoint
from nanoflow.schedule import built_in_schedule
from nanoflow.scheduler.even import TILE_ROWS
from nanoflow.tune.costs import CostModel, Load, Spec
from nanoflow.tune.table import OpTable, shipped_table
from shapes import write_model

STEPS = 200  # of the clock
LEAST_CLOCK = 0.4  # of the full one


def roofline_us(table: OpTable, spec: Spec, load: Load) -> float:
    """Of a step. Raises ValueError where nothing is known to limit the device's power."""
    power = (table.cap_watts - table.idle_watts) * 1e-6  # joules a microsecond
    if power <= 0:
        raise ValueError(f"the op times of {table.device} do not say what limits its power")
    model, sequential = CostModel(table, spec), built_in_schedule("sequential", table.width)

    def us(clock: float) -> float:
        stages = [model.stage(name, 1.0, table.width, load, clock) for name in ("qkv", "o", "mlp")]
        attention = model.stage("attn", 1.0, table.width, load, clock)
        head = model.head(sequential, load, clock)
        joules = sum(cost.joules for cost in (*stages, attention)) * spec.num_layers + head.joules
        beside = sum(cost.us for cost in stages) * spec.num_layers + head.us
        return max(beside, attention.us * spec.num_layers, joules / power)

    return min(us(1 - (1 - LEAST_CLOCK) * step / STEPS) for step in range(STEPS + 1))


def loads_of(
    run: Mapping[str, Any], keys: tuple[int, int] | None = None
) -> list[tuple[float, Load]]:
    """Loads of a result's steps, and which part of the steps has each: steps keep to whole tiles of
    rows, so many of them have the next fewer, or more, than on average.

    `keys`: what a decode and a row of a prompt read, in the mean; by default those of requests that
    are all alike and of all ages.
    """
    window = run["steady_state"]
    context, prefill_context = keys or (
        round(window["mean_input"] + window["mean_output"] / 2),
        round(window["mean_input"] / 2),
    )
    decodes = round(window["output_tokens"] / window["steps"])
    rows = decodes + window["prompt_tokens"] / window["steps"]
    fewer = int(rows / TILE_ROWS) * TILE_ROWS
    more = (rows - fewer) / TILE_ROWS
    return [
        (share, Load(decodes, context, rows - decodes, prefill_context))
        for share, rows in ((1 - more, fewer), (more, fewer + TILE_ROWS))
    ]


def row_of(content: Mapping[str, Any], keys: tuple[int, int] | None = None) -> str:
    """Of a Markdown table: of each schedule tokens a joule and the two parts. Raises ValueError on
    a device without op times, and on ranks and experts, which the op times say nothing of."""
    runs: Mapping[str, Mapping[str, Any]] = content["runs"]  # on one engine
    first = next(iter(runs.values()))
    table, spec = shipped_table(first["gpu"]), spec_of(content["model"])
    if table is None:
        raise ValueError(f"the package has no op times of {first['gpu']}")
    if first["tensor_parallel_size"] > 1 or spec.num_experts > 0:
        raise ValueError(f"{content['model']} is shared by GPUs or has experts")
    cells = [f"{content['model']} {content['workload']}"]
    for name, run in runs.items():
        us = sum(part * roofline_us(table, spec, load) for part, load in loads_of(run, keys))
        cell = f"{name}: {1 / run['j_per_token']:.1f}, {us / 1e3 / run['step_ms']:.0%}"
        if ceiling := run["gemm_ceiling_tflops"]:
            cell += f", {run['matrix_tflops'] / ceiling:.0%}"
        cells.append(cell)
    return f"| {' | '.join(cells)} |"


def spec_of(shape: str) -> _core.ModelSpec:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(write_model(Path(folder), shape), "dummy")
        return _core.ModelSpec(**checkpoint.model.spec_arguments("bfloat16"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="of --compare")
    parser.add_argument("--keys", type=int, nargs=2, metavar=("DECODE", "PROMPT"))
    options = parser.parse_args(arguments)
    for path in options.results:
        print(row_of(json.loads(path.read_text()), options.keys))
    return 0


if __name__ == "__main__":
    sys.exit(main())
