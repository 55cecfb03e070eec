"""Stands in for `_core.Weights`, and reads tensors of a checkpoint whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow.loading.tensors import CHUNK_BYTES, CheckpointTensor


class FakeWeights:
    """Keeps what a `_core.Weights` would: every tensor as float32, and which rows were filled.

    `shapes`: the tensors there are, for those who ask."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
        self._shapes = shapes or {}
        self.filled: dict[str, tuple[int, float, float]] = {}  # seed, mean, std
        self.parts: dict[str, list[tuple[int, NDArray[np.float32]]]] = {}
        self.largest = 0  # bytes of the largest array it was given
        self.is_finished = False

    def load(self, name: str, array: NDArray[Any], row_begin: int = 0) -> None:
        assert array.flags.c_contiguous and array.flags.aligned
        self.largest = max(self.largest, array.nbytes)
        self.parts.setdefault(name, []).append((row_begin, as_float32(array).copy()))

    def fill_normal(self, name: str, seed: int, mean: float, std: float) -> None:
        self.filled[name] = (seed, mean, std)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def finish(self) -> None:
        self.is_finished = True

    def tensor(self, name: str) -> NDArray[np.float32]:
        """All rows in order; fails when some are missing or were given twice."""
        position = 0
        parts = sorted(self.parts[name], key=lambda part: part[0])
        for begin, rows in parts:
            assert begin == position
            position += len(rows)
        return np.concatenate([rows for _, rows in parts])


def as_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    if array.dtype == np.uint16:  # bfloat16 bits
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def read(tensor: CheckpointTensor, max_bytes: int = CHUNK_BYTES) -> NDArray[np.float32]:
    return np.concatenate([as_float32(rows) for _, rows in tensor.chunks(max_bytes)])
