"""Times every GEMM kernel in short bursts over rows, shapes and SMs: what the choice is fitted to.

Usage: python bench/cuda/sweep.py LIBRARY OUT.json COMMIT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from native import Kernels
from products import SHAPES, operands
from timing import burst_us, environment

ROWS = (1, 16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
WIDTHS = (132, 124, 116, 108, 100, 92, 84)
FEW_ROWS = 256  # kernels for few rows are not timed on more


def measure(kernels: Kernels, shape: str, rows: int) -> dict[str, Any]:
    features, depth = SHAPES[shape]
    product = operands(shape, rows)
    x, _, out = product
    entry: dict[str, Any] = {"shape": shape, "rows": rows, "N": features, "K": depth}
    entry["cublas_us"] = burst_us(lambda i: torch.matmul(x, product.weight(i).T, out=out))
    for sms in WIDTHS:
        times = entry[str(sms)] = []
        for kernel, name in enumerate(kernels.gemm_names()):
            skipped = rows > FEW_ROWS and int(name.split("x")[0]) < 128
            times.append(
                None
                if skipped
                else burst_us(
                    lambda i, k=kernel, s=sms: kernels.gemm(x, product.weight(i), out, k, s)
                )
            )
    return entry


def main() -> None:
    kernels = Kernels(Path(sys.argv[1]))
    torch.manual_seed(0)
    results = [measure(kernels, shape, rows) for shape in SHAPES for rows in ROWS]
    record = {**environment(sys.argv[3]), "kernels": kernels.gemm_names(), "results": results}
    Path(sys.argv[2]).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
