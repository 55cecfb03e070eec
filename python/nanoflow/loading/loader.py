"""Fills the engine's weights from the tensors of a checkpoint, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from nanoflow.loading.tensors import CheckpointTensor
from nanoflow.models.config import CheckpointWeight


class WeightStore(Protocol):
    """What is filled: `_core.Weights`, or a fake of it in tests."""

    def load(self, name: str, array: NDArray[Any], row_begin: int = 0) -> None: ...

    def fill_normal(self, name: str, seed: int, mean: float, std: float) -> None: ...

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def finish(self) -> None: ...


def load_weights(
    store: WeightStore,
    tensors: Mapping[str, CheckpointTensor],
    weights: Mapping[str, CheckpointWeight],
    is_ignored: Callable[[str], bool],
    source: str,
) -> None:
    """Copies every tensor of `weights` from `tensors` into `store`, fusing as the targets say.

    The store converts dtypes. Beside the store itself, at most one chunk of rows is held in memory
    (tensors.CHUNK_BYTES). `source` names the checkpoint in errors.
    Raises one ValueError naming every missing, unexpected and misshapen tensor, before any is read.
    """
    check_tensors(tensors, weights, is_ignored, source)
    for name, tensor in tensors.items():  # in file order
        weight = weights.get(name)
        if weight is None:
            continue
        for begin, rows in tensor.chunks():
            _load_rows(store, weight, begin, rows)
    store.finish()


def check_tensors(
    tensors: Mapping[str, CheckpointTensor],
    weights: Mapping[str, CheckpointWeight],
    is_ignored: Callable[[str], bool],
    source: str,
) -> None:
    """Raises one ValueError naming every missing, unexpected and misshapen tensor."""
    missing = [name for name in weights if name not in tensors]
    unexpected = [name for name in tensors if name not in weights and not is_ignored(name)]
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(weight.shape)}"
        for name, weight in weights.items()
        if name in tensors and tensors[name].shape != weight.shape
    ]
    findings = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("misshapen tensors", misshapen),
        )
        if names
    ]
    if findings:
        raise ValueError(f"{source} does not fit its config; {'; '.join(findings)}")


def _load_rows(
    store: WeightStore, weight: CheckpointWeight, begin: int, rows: NDArray[Any]
) -> None:
    """Gives what begins at row `begin` of a checkpoint tensor to its targets."""
    matrix_rows = math.prod(weight.shape[1:-1])  # of each matrix, where the tensor holds several
    if len(weight.shape) > 2:
        rows = rows.reshape(-1, weight.shape[-1])
    begin *= matrix_rows
    end = begin + len(rows)
    target_begin = 0
    for target in weight.targets:
        low, high = max(begin, target_begin), min(end, target_begin + target.rows)
        if low < high:
            store.load(
                target.name,
                rows[low - begin : high - begin],
                row_begin=target.row_begin + low - target_begin,
            )
        target_begin += target.rows
