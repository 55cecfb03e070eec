"""Stands in for `_core.Weights`, and reads tensors of a checkpoint whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow.loading.tensors import CHUNK_BYTES, CheckpointTensor


class FakeWeights:
    """Keeps what a `_core.Weights` would: every tensor as float32, and which rows were filled."""

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[int, NDArray[np.float32]]]] = {}
        self.largest = 0  # bytes of the largest array it was given
        self.is_checked = False

    def load(self, name: str, array: NDArray[Any], row_begin: int = 0) -> None:
        assert array.flags.c_contiguous and array.flags.aligned
        self.largest = max(self.largest, array.nbytes)
        self.parts.setdefault(name, []).append((row_begin, as_float32(array).copy()))

    def check_complete(self) -> None:
        self.is_checked = True

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
