"""The rate of the device's longest matrix product alone: what a step's rate is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nanoflow import _core

ROWS, FEATURES, DEPTH = 1024, 28672, 4096  # gate and up of Llama-3.1-8B
SECONDS = 4.0  # the first half is dropped
_BLOCK = 1 << 20  # random values; larger arrays repeat them


def gemm_ceiling_tflops(
    device: str,
    *,
    rows: int = ROWS,
    features: int = FEATURES,
    depth: int = DEPTH,
    seconds: float = SECONDS,
) -> float:
    """Sustained TFLOP/s of x [rows, depth] · weightᵀ [features, depth] in bfloat16, by the kernel
    that nanoflow chooses, on normally distributed values (zeros would take less power).
    """
    rng = np.random.default_rng(0)
    us = _core.time_op(
        "gemm",
        _core.Backend(device),
        seconds,
        x=_normal((rows, depth), 1.0, rng),
        weight=_normal((features, depth), depth**-0.5, rng),
        out=np.zeros((rows, features), np.uint16),
    )
    return 2 * rows * features * depth / us * 1e-6


def _normal(shape: tuple[int, int], scale: float, rng: np.random.Generator) -> NDArray[np.uint16]:
    """bfloat16: the upper halves of float32 values."""
    block = (rng.standard_normal(_BLOCK, np.float32) * scale).view(np.uint32) >> 16
    return np.resize(block.astype(np.uint16), shape)
