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
from products import SHAPES, Run, operands, timed_in_turns
from timing import environment

ROWS = (256, 320, 512, 640, 1024, 2048)
SECONDS = 1.2  # of a run; there are two of each product, in turns with cuBLAS's


def measure(kernels: Kernels, shape: str, rows: int) -> dict[str, Any]:
    features, depth = SHAPES[shape]
    product = operands(shape, rows)
    x, weights, out = product
    runs: dict[str, Run] = {
        "nanoflow": lambda i: kernels.gemm(x, product.weight(i), out),
        "cublas": lambda i: torch.matmul(x, product.weight(i).T, out=out),
    }
    if shape == "gate_up":  # as the engine runs it
        gated = torch.empty(rows, features // 2, device="cuda", dtype=torch.bfloat16)
        runs["fused"] = lambda i: kernels.gemm(x, product.weight(i), gated, silu_mul=True)
    if shape in ("o", "down"):
        runs["fused"] = lambda i: kernels.gemm(x, product.weight(i), out, accumulate=True)
    kernel = kernels.gemm_names()[kernels.choose_gemm(x, weights[0], out, kernels.sms)]
    flop = 2 * rows * features * depth
    times = timed_in_turns(runs, SECONDS)
    for time in times.values():
        time["tflop_s"] = flop / time["us"] * 1e-6
        time["pj_per_flop"] = time["watts"] * time["us"] / flop * 1e6
    speedup = times["cublas"]["us"] / times["nanoflow"]["us"]
    entry = {"shape": shape, "rows": rows, "N": features, "K": depth, "kernel": kernel}
    return {**entry, **times, "speedup": speedup}


def main() -> None:
    kernels = Kernels(Path(sys.argv[1]))
    torch.manual_seed(0)
    results = []
    for rows in ROWS:
        for shape in SHAPES:
            entry = measure(kernels, shape, rows)
            results.append(entry)
            print(f"{shape:8} {rows:5} {entry['kernel']:17} {entry['speedup']:.3f}", end="")
            for name in ("nanoflow", "cublas", "fused"):
                if name in entry:
                    time = entry[name]
                    print(
                        f" | {name} {time['us']:7.1f} us {time['tflop_s']:4.0f} TFLOP/s "
                        f"{time['watts']:4.0f} W {time['sm_mhz']:5.0f} MHz "
                        f"{time['pj_per_flop']:.3f} pJ/FLOP",
                        end="",
                    )
            print()
    Path(sys.argv[2]).write_text(
        json.dumps({**environment(sys.argv[3]), "results": results}, indent=1)
    )


if __name__ == "__main__":
    main()
