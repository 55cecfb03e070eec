"""Times every matrix kernel under sustained load beside torch's cuBLAS: what the choice's energy
term is fitted to.

Usage: python bench/cuda/gemm_kernels.py LIBRARY OUT.json COMMIT [--shapes o down] [--rows 256]
    [--kernels 2 7 10] [--sms 132 108] [--seconds 0.3] [--accumulate]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from native import Kernels
from products import SHAPES, Operands, Run, operands, timer
from timing import environment

ROWS = (256, 512, 1024)
SECONDS = 0.5  # of a run, the first half dropped
FEW_ROWS = 128  # kernels with tiles of fewer rows are left out


def measure(
    kernels: Kernels, shape: str, rows: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    product = operands(shape, rows)
    entries = []
    for sms in options.sms or [kernels.sms]:
        for name, run in runs_of(kernels, product, sms, options).items():
            time = timer(run)(options.seconds)
            entry = {"shape": shape, "rows": rows, "sms": sms, "kernel": name, **time}
            entries.append(entry)
            print(
                f"{shape:8}{rows:6} {sms:4} {name:18} {time['us']:7.1f} us "
                f"{time['sm_mhz']:5.0f} MHz",
                flush=True,
            )
    return entries


def runs_of(
    kernels: Kernels, product: Operands, sms: int, options: argparse.Namespace
) -> dict[str, Run]:
    """Of each kernel asked for, and of cuBLAS where the product has all SMs."""
    x, _, out = product
    runs: dict[str, Run] = {}
    if sms == kernels.sms:
        runs["cublas"] = (
            (lambda i: torch.addmm(out, x, product.weight(i).T, out=out))
            if options.accumulate
            else (lambda i: torch.matmul(x, product.weight(i).T, out=out))
        )
    for kernel, name in enumerate(kernels.gemm_names()):
        is_asked_for = options.kernels is None or kernel in options.kernels
        if is_asked_for and int(name.split("x")[0]) >= FEW_ROWS:
            runs[name] = lambda i, k=kernel: kernels.gemm(
                x, product.weight(i), out, k, sms, accumulate=options.accumulate
            )
    return runs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("commit")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--kernels", nargs="+", type=int, help="by number (default: all)")
    parser.add_argument("--sms", nargs="+", type=int, help="of the GPU (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--accumulate", action="store_true", help="out += product")
    return parser.parse_args()


def main() -> None:
    options = parse()
    kernels = Kernels(options.library)
    torch.manual_seed(0)
    results = [
        one
        for rows in options.rows
        for shape in options.shapes
        for one in measure(kernels, shape, rows, options)
    ]
    record = {**environment(options.commit), "results": results}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
