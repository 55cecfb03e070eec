"""Times a layer's four matrix products, as the engine runs them, on parts of a GPU under sustained
load.

Usage: python bench/cuda/gemm_widths.py LIBRARY OUT.json COMMIT [--rows 512 640] [--sms 132 116]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from native import Kernels
from products import Run, operands, timed_in_turns
from timing import environment

ROWS = (512, 576, 640, 1024)
SMS = (132, 116, 108)  # the first is what the others are compared with
SECONDS = 2.4  # of a run, its first half dropped; there are two of each, the second in reverse

FUSED: dict[str, dict[str, bool]] = {
    "qkv": {},
    "o": {"accumulate": True},
    "gate_up": {"silu_mul": True},
    "down": {"accumulate": True},
}


class Layers:
    """The products of `COPIES` layers in turn, so that no weights stay in the cache."""

    def __init__(self, kernels: Kernels, rows: int) -> None:
        self._kernels = kernels
        self._operands = {
            name: operands(name, rows, "silu_mul" in fused) for name, fused in FUSED.items()
        }

    def run_on(self, sms: int) -> Run:
        def run(i: int) -> None:
            for name, product in self._operands.items():
                x, _, out = product
                self._kernels.gemm(x, product.weight(i), out, sms=sms, **FUSED[name])

        return run

    def chosen(self, sms: int) -> dict[str, str]:
        """The kernel of each product."""
        names = self._kernels.gemm_names()
        return {
            name: names[
                self._kernels.choose_gemm(x, weights[0], out, sms, "silu_mul" in FUSED[name])
            ]
            for name, (x, weights, out) in self._operands.items()
        }


def measure(kernels: Kernels, rows: int, widths: list[int], seconds: float) -> list[dict[str, Any]]:
    layers = Layers(kernels, rows)
    times = timed_in_turns({sms: layers.run_on(sms) for sms in widths}, seconds)
    entries: list[dict[str, Any]] = []
    for sms, time in times.items():
        entry = {"rows": rows, "sms": sms, "kernels": layers.chosen(sms), **time}
        entry["of_all"] = time["us"] / times[widths[0]]["us"]
        entries.append(entry)
        print(
            f"{rows:5} rows, {sms:3} SMs {entry['us']:7.1f} us {entry['of_all']:.3f} "
            f"{entry['watts']:4.0f} W {entry['sm_mhz']:5.0f} MHz {entry['kernels']}",
            flush=True,
        )
    return entries


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("commit")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--sms", nargs="+", type=int, default=SMS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    kernels = Kernels(options.library)
    torch.manual_seed(0)
    results = [
        entry
        for rows in options.rows
        for entry in measure(kernels, rows, list(options.sms), options.seconds)
    ]
    record = {**environment(options.commit), "results": results}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
