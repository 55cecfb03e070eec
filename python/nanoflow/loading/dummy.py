"""Random weights made from a config alone, for runs that measure and do not need sense."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow.loading.tensors import CHUNK_BYTES, row_ranges
from nanoflow.models.config import CheckpointWeight

_MATRIX_STD = 0.02  # what such models are initialised with
_NORM_STD = 0.1  # norm weights lie around 1


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """A tensor drawn on demand; its values depend on name, shape and seed only."""

    name: str
    shape: tuple[int, ...]
    seed: int
    dtype: str = "F32"

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, NDArray[Any]]]:
        """See CheckpointTensor: vectors are 1 + 0.1 N(0, 1), matrices 0.02 N(0, 1)."""
        generator = np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])
        for begin, end in row_ranges(self.shape[0], 4 * prod(self.shape[1:]), max_bytes):
            rows = generator.standard_normal((end - begin, *self.shape[1:]), dtype=np.float32)
            if len(self.shape) == 1:
                rows *= np.float32(_NORM_STD)
                rows += np.float32(1)
            else:
                rows *= np.float32(_MATRIX_STD)
            yield begin, rows


def random_tensors(weights: Mapping[str, CheckpointWeight], seed: int) -> dict[str, RandomTensor]:
    """One random tensor for each tensor a checkpoint of the model would hold."""
    return {name: RandomTensor(name, weight.shape, seed) for name, weight in weights.items()}
