"""Times every matrix kernel under sustained load beside torch's cuBLAS: what the choice's energy
term is fitted to.

Usage: python bench/cuda/gemm_kernels.py LIBRARY OUT.json COMMIT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gemm import COPIES, SHAPES, replayed
from native import Kernels
from timing import environment, sustained

ROWS = (256, 512, 1024)
SECONDS = 0.5  # of a run, the first half dropped
FEW_ROWS = 128  # kernels with tiles of fewer rows are left out


def measure(kernels: Kernels, shape: str, rows: int) -> list[dict[str, Any]]:
    features, depth = SHAPES[shape]
    x = torch.randn(rows, depth, device="cuda").bfloat16()
    weights = [
        (torch.randn(features, depth, device="cuda") * 0.02).bfloat16() for _ in range(COPIES)
    ]
    out = torch.empty(rows, features, device="cuda", dtype=torch.bfloat16)
    runs: dict[str, Any] = {"cublas": lambda i: torch.matmul(x, weights[i % COPIES].T, out=out)}
    for kernel, name in enumerate(kernels.gemm_names()):
        if int(name.split("x")[0]) >= FEW_ROWS:
            runs[name] = lambda i, k=kernel: kernels.gemm(x, weights[i % COPIES], out, k)
    entries = []
    for name, run in runs.items():
        replay, count = replayed(run)
        result = sustained(replay, SECONDS)
        entry = {"shape": shape, "rows": rows, "kernel": name, "us": result["us"] / count}
        entries.append({**entry, "sm_mhz": result["sm_mhz"], "watts": result["watts"]})
        print(f"{shape:8}{rows:6} {name:18} {entry['us']:7.1f} us {result['sm_mhz']:5.0f} MHz")
    return entries


def main() -> None:
    kernels = Kernels(Path(sys.argv[1]))
    torch.manual_seed(0)
    results = [one for rows in ROWS for shape in SHAPES for one in measure(kernels, shape, rows)]
    record = {**environment(sys.argv[3]), "results": results}
    Path(sys.argv[2]).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
