"""Times the matrix products of Llama-3.1-8B's layers under sustained load, beside torch's cuBLAS.

Usage: python bench/cuda/gemm.py LIBRARY OUT.json COMMIT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from native import Kernels
from timing import burst_us, environment, sustained

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (256, 320, 512, 640, 1024, 2048)
COPIES = 3  # of the weights, taken in turn, so that none stays in the cache
GRAPH_US = 6000  # what a graph of launches is to take
SECONDS = 1.2  # of a run; there are two of each product, in turns with cuBLAS's


def replayed(run: Callable[[int], object]) -> tuple[Callable[[int], object], int]:
    """Replays a graph of runs, and how many: so that launching never limits."""
    count = max(COPIES, int(GRAPH_US / burst_us(run, 3)) // COPIES * COPIES)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            run(i)
    return lambda _: graph.replay(), count


def timed(runs: dict[str, Callable[[int], object]], flop: int) -> dict[str, dict[str, float]]:
    """The mean of two sustained runs each, in turns."""
    graphs = {name: replayed(run) for name, run in runs.items()}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for name in (*runs, *reversed(runs)):
        replay, count = graphs[name]
        result = sustained(replay, SECONDS)
        samples[name].append({**result, "us": result["us"] / count})
    results = {}
    for name, pair in samples.items():
        mean = {key: sum(sample[key] for sample in pair) / len(pair) for key in pair[0]}
        mean["tflop_s"] = flop / mean["us"] * 1e-6
        mean["pj_per_flop"] = mean["watts"] * mean["us"] / flop * 1e6
        results[name] = mean
    return results


def measure(kernels: Kernels, shape: str, rows: int) -> dict[str, Any]:
    features, depth = SHAPES[shape]
    x = torch.randn(rows, depth, device="cuda").bfloat16()
    weights = [
        (torch.randn(features, depth, device="cuda") * 0.02).bfloat16() for _ in range(COPIES)
    ]
    out = torch.empty(rows, features, device="cuda", dtype=torch.bfloat16)
    runs = {
        "nanoflow": lambda i: kernels.gemm(x, weights[i % COPIES], out),
        "cublas": lambda i: torch.matmul(x, weights[i % COPIES].T, out=out),
    }
    if shape == "gate_up":  # as the engine runs it
        half = torch.empty(rows, features // 2, device="cuda", dtype=torch.bfloat16)
        runs["fused"] = lambda i: kernels.gemm(x, weights[i % COPIES], half, silu_mul=True)
    if shape in ("o", "down"):
        out.zero_()
        runs["fused"] = lambda i: kernels.gemm(x, weights[i % COPIES], out, accumulate=True)
    kernel = kernels.gemm_names()[kernels.choose_gemm(x, weights[0], out, kernels.sms)]
    times = timed(runs, 2 * rows * features * depth)
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
