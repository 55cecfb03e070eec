"""The rate of matrix products alone on this CPU: what the speed of a model is compared with.

The products of bfloat16 matrices, by nanoflow's kernels and, where torch is installed, by torch's,
over a few shapes; the highest rate is the machine's peak.

    python bench/cpu_peak.py
"""

from __future__ import annotations

import argparse
import os
from time import perf_counter
from typing import Any

import numpy as np

from nanoflow import _core

# (rows, features, depth): square; gate and up, and down, of SmolLM2-135M; of an 8B model, in part
SHAPES = ((1024, 1024, 1024), (1024, 3072, 576), (1024, 576, 1536), (1024, 4096, 4096))


def measure_peak(threads: int, seconds: float) -> dict[str, Any]:
    """GFLOP/s of each library and shape, and the highest; `seconds` for each of them."""
    rates = {"nanoflow": {shape: nanoflow_gflops(shape, threads, seconds) for shape in SHAPES}}
    try:
        import torch
    except ImportError:
        pass
    else:
        torch.set_num_threads(threads)
        rates["torch"] = {shape: torch_gflops(torch, shape, seconds) for shape in SHAPES}
    return {
        "gflops": max(max(found.values()) for found in rates.values()),
        "rates": {
            library: {"x".join(map(str, shape)): rate for shape, rate in found.items()}
            for library, found in rates.items()
        },
        "threads": threads,
    }


def nanoflow_gflops(shape: tuple[int, int, int], threads: int, seconds: float) -> float:
    rows, features, depth = shape
    us = _core.time_op(
        "gemm",
        _core.Backend("cpu", threads=threads),
        seconds,
        x=_bfloat16(rows, depth),
        weight=_bfloat16(features, depth),
        out=np.zeros((rows, features), np.uint16),
    )
    return 2e-3 * rows * features * depth / us


def torch_gflops(torch: Any, shape: tuple[int, int, int], seconds: float) -> float:
    rows, features, depth = shape
    x = torch.randn(rows, depth).bfloat16()
    layer = torch.nn.Linear(depth, features, bias=False).bfloat16()
    with torch.inference_mode():
        layer(x)
        runs, begin = 0, perf_counter()
        while perf_counter() - begin < seconds:
            layer(x)
            runs += 1
        elapsed = perf_counter() - begin
    return 2e-9 * rows * features * depth * runs / elapsed


def _bfloat16(rows: int, columns: int) -> Any:
    """Normally distributed: the upper halves of float32 values."""
    values = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each product (default: 1)")
    options = parser.parse_args()
    found = measure_peak(options.threads, options.seconds)
    for library, rates in found["rates"].items():
        for shape, rate in rates.items():
            print(f"{library:10}{shape:>16}{rate:9.0f} GFLOP/s")
    print(f"peak: {found['gflops']:.0f} GFLOP/s with {options.threads} threads")


if __name__ == "__main__":
    main()
