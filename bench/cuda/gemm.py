"""Times the matrix products of Llama-3.1-8B's layers under sustained load, beside torch's cuBLAS.

Usage: python bench/cuda/gemm.py LIBRARY OUT.json COMMIT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from native import Kernels
from timing import environment, sustained

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (256, 512, 1024, 2048)
COPIES = 3  # of the weights, taken in turn, so that none stays in the cache


def measure(kernels: Kernels, shape: str, rows: int) -> dict[str, Any]:
    features, depth = SHAPES[shape]
    x = torch.randn(rows, depth, device="cuda").bfloat16()
    weights = [
        (torch.randn(features, depth, device="cuda") * 0.02).bfloat16() for _ in range(COPIES)
    ]
    out = torch.empty(rows, features, device="cuda", dtype=torch.bfloat16)
    flop = 2 * rows * features * depth
    kernel = kernels.choose_gemm(x, weights[0], out, kernels.sms)
    entry = {"shape": shape, "rows": rows, "N": features, "K": depth}
    entry["kernel"] = kernels.gemm_names()[kernel]
    runs = {
        "nanoflow": lambda i: kernels.gemm(x, weights[i % COPIES], out, kernel),
        "cublas": lambda i: torch.matmul(x, weights[i % COPIES].T, out=out),
    }
    for name, run in runs.items():
        result = sustained(run)
        result["tflop_s"] = flop / result["us"] * 1e-6
        result["pj_per_flop"] = result["watts"] * result["us"] / flop * 1e6
        entry[name] = result
    entry["speedup"] = entry["cublas"]["us"] / entry["nanoflow"]["us"]
    return entry


def main() -> None:
    kernels = Kernels(Path(sys.argv[1]))
    torch.manual_seed(0)
    results = []
    for rows in ROWS:
        for shape in SHAPES:
            entry = measure(kernels, shape, rows)
            results.append(entry)
            ours, cublas = entry["nanoflow"], entry["cublas"]
            print(
                f"{shape:8} {rows:5} {entry['kernel']:17} {ours['us']:7.1f} us "
                f"{ours['tflop_s']:4.0f} TFLOP/s {ours['watts']:4.0f} W {ours['sm_mhz']:5.0f} MHz "
                f"{ours['pj_per_flop']:.3f} pJ/FLOP | cuBLAS {cublas['us']:7.1f} us "
                f"{cublas['watts']:4.0f} W {cublas['sm_mhz']:5.0f} MHz "
                f"{cublas['pj_per_flop']:.3f} | {entry['speedup']:.3f}"
            )
    Path(sys.argv[2]).write_text(
        json.dumps({**environment(sys.argv[3]), "results": results}, indent=1)
    )


if __name__ == "__main__":
    main()
