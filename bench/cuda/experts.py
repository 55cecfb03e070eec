"""Times the grouped products of two mixtures of experts under sustained load.

Usage: python bench/cuda/experts.py OUT.json COMMIT [DEVICE]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow import _core
from nanoflow.bench.environment import command_line

ROWS = (16, 64, 256, 512, 1024, 2048)  # of a step; each goes to `active` experts
SECONDS = 1.5  # of a run, the first half dropped
_BLOCK = 1 << 20  # random values; larger arrays repeat them


@dataclass(frozen=True)
class Mixture:
    name: str
    experts: int
    active: int
    hidden: int
    inner: int


MIXTURES = (
    Mixture("mixtral-8x7b", experts=8, active=2, hidden=4096, inner=14336),
    Mixture("qwen3-30b-a3b", experts=128, active=8, hidden=2048, inner=768),
)


def normal(shape: tuple[int, ...], scale: float, rng: np.random.Generator) -> NDArray[np.uint16]:
    """bfloat16: the upper halves of float32 values (zeros would take less power)."""
    block = (rng.standard_normal(_BLOCK, np.float32) * scale).view(np.uint32) >> 16
    return np.resize(block.astype(np.uint16), shape)


def route(mixture: Mixture, rows: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """[E + 1] offsets of the pairs of rows that choose their experts at random."""
    ranks = rng.standard_normal((rows, mixture.experts)).argsort(axis=1)[:, : mixture.active]
    counts = np.bincount(ranks.reshape(-1), minlength=mixture.experts)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def measure(device: str, mixture: Mixture, rows: int, seconds: float) -> list[dict[str, Any]]:
    """gate and up, then down, of a step with so many rows."""
    rng = np.random.default_rng(rows)
    backend = _core.Backend(device)
    offsets = route(mixture, rows, rng)
    pairs = rows * mixture.active
    entries = []
    for op, features, depth, columns in (
        ("grouped_gemm_silu_mul", 2 * mixture.inner, mixture.hidden, mixture.inner),
        ("grouped_gemm", mixture.hidden, mixture.inner, mixture.hidden),
    ):
        us = _core.time_op(
            op,
            backend,
            seconds,
            x=normal((pairs, depth), 1.0, rng),
            weight=normal((mixture.experts, features, depth), depth**-0.5, rng),
            offsets=offsets,
            out=np.zeros((pairs, columns), np.uint16),
        )
        reached = int((np.diff(offsets) > 0).sum())
        entries.append(
            {
                "model": mixture.name,
                "op": op,
                "rows": rows,
                "us": us,
                "tflop_s": 2 * pairs * features * depth / us * 1e-6,
                "weights_gb_s": 2 * reached * features * depth / us * 1e-3,
            }
        )
    return entries


def main() -> None:
    device = sys.argv[3] if len(sys.argv) > 3 else "cuda"
    results = []
    for mixture in MIXTURES:
        for rows in ROWS:
            for entry in measure(device, mixture, rows, SECONDS):
                results.append(entry)
                print(
                    f"{entry['model']:14} {entry['op']:22} {rows:5} {entry['us']:9.1f} us "
                    f"{entry['tflop_s']:6.1f} TFLOP/s {entry['weights_gb_s']:6.0f} GB/s",
                    flush=True,
                )
    content = {
        "device": _core.Backend(device).description,
        "commit": sys.argv[2],
        "command": command_line(),
        "results": results,
    }
    Path(sys.argv[1]).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
