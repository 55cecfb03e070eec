"""The weights of all ranks as one store: every rank is given every tensor and keeps its part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from nanoflow.loading.loader import WeightStore


class RankStores:
    """Passes what it is given to the store of each rank; a checkpoint is read once for all."""

    def __init__(self, stores: Sequence[WeightStore]) -> None:
        self._stores = stores

    def load(self, name: str, array: NDArray[Any], row_begin: int = 0) -> None:
        for store in self._stores:
            store.load(name, array, row_begin)

    def fill_normal(self, name: str, seed: int, mean: float, std: float) -> None:
        for store in self._stores:
            store.fill_normal(name, seed, mean, std)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._stores[0].shapes()

    def finish(self) -> None:
        for store in self._stores:
            store.finish()
