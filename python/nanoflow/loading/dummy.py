"""Random weights made from a config alone, for runs that measure and do not need sense."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow.loading.tensors import CHUNK_BYTES, row_ranges
from nanoflow.models.config import CheckpointWeight

_MATRIX_STD = 0.02  # what such models are initialised with
_NORM_STD = 0.1  # norm weights lie around 1
_BLOCK_VALUES = 1 << 20  # drawn by one generator


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """A tensor drawn on demand; its values depend on name, shape and seed only."""

    name: str
    shape: tuple[int, ...]
    seed: int
    dtype: str = "F32"

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, NDArray[Any]]]:
        """See CheckpointTensor: vectors are 1 + 0.1 N(0, 1), matrices 0.02 N(0, 1).

        Blocks of rows have generators of their own, so that all CPUs draw at once and the values
        depend neither on their number nor on the chunks.
        """
        step = max(1, _BLOCK_VALUES // max(1, prod(self.shape[1:])))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for begin, end in row_ranges(self.shape[0], 4 * prod(self.shape[1:]), max_bytes):
                rows = np.empty((end - begin, *self.shape[1:]), np.float32)

                def fill(block: int, begin: int = begin, rows: NDArray[Any] = rows) -> None:
                    values = self._draw(block, step)
                    low = max(begin, block * step)
                    high = min(begin + len(rows), block * step + len(values))
                    rows[low - begin : high - begin] = values[low - block * step :][: high - low]

                list(pool.map(fill, range(begin // step, -(-end // step))))
                yield begin, rows

    def _draw(self, block: int, step: int) -> NDArray[Any]:
        """Rows [block * step, (block + 1) * step), as far as there are such."""
        generator = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), block])
        count = min(step, self.shape[0] - block * step)
        values = generator.standard_normal((count, *self.shape[1:]), dtype=np.float32)
        if len(self.shape) == 1:
            return values * np.float32(_NORM_STD) + np.float32(1)
        values *= np.float32(_MATRIX_STD)
        return values


def random_tensors(weights: Mapping[str, CheckpointWeight], seed: int) -> dict[str, RandomTensor]:
    """One random tensor for each tensor a checkpoint of the model would hold."""
    return {name: RandomTensor(name, weight.shape, seed) for name, weight in weights.items()}
