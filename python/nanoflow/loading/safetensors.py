"""Reader of safetensors files without torch: memory-mapped, lazy, bfloat16 as uint16 bits.

The format is 8 bytes of little-endian header length, a JSON header and one block of tensor data.
The `safetensors` package is not used because its NumPy interface has no bfloat16.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow.loading.tensors import CHUNK_BYTES, release_pages, row_ranges

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # as the reference implementation

_ITEM_SIZES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
        **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
        **dict.fromkeys(("U32", "I32", "F32"), 4),
        **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
    }
)
_NUMPY_DTYPES: Mapping[str, str] = MappingProxyType({"F32": "<f4", "F16": "<f2", "BF16": "<u2"})


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """A tensor in a mapped file; see CheckpointTensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    begin: int  # byte offset in the file
    mapping: mmap.mmap

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, NDArray[Any]]]:
        """See CheckpointTensor. Raises ValueError on a dtype that is no supported float."""
        if self.dtype not in _NUMPY_DTYPES:
            raise ValueError(
                f"{self.path}: tensor {self.name} has dtype {self.dtype}, "
                f"supported are {', '.join(_NUMPY_DTYPES)}"
            )
        shape = self.shape or (1,)
        row_items = prod(shape[1:])
        row_bytes = row_items * _ITEM_SIZES[self.dtype]
        for first, last in row_ranges(shape[0], row_bytes, max_bytes):
            begin = self.begin + first * row_bytes
            flat = np.frombuffer(
                self.mapping, _NUMPY_DTYPES[self.dtype], (last - first) * row_items, begin
            )
            yield first, np.require(flat.reshape(last - first, *shape[1:]), None, ["C", "A"])
            release_pages(self.mapping, begin, self.begin + last * row_bytes)


def open_safetensors(path: Path) -> dict[str, SafetensorsTensor]:
    """The tensors of one file, in the order of their data.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it: truncated, a
    corrupt header, or tensor extents that do not cover the data exactly once.
    """
    with path.open("rb") as file:
        file_size = file.seek(0, 2)
        file.seek(0)
        header_size = int.from_bytes(file.read(8), "little")
        if file_size < 8 or header_size > min(file_size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{path}: not a safetensors file or truncated: the header should take "
                f"{header_size} bytes, the file has {file_size}"
            )
        header = _parse_header(path, file.read(header_size))
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data_begin = 8 + header_size
    tensors = []
    for name, entry in header.items():
        dtype, shape, (begin, end) = _parse_entry(path, name, entry)
        expected = prod(shape) * _ITEM_SIZES[dtype]
        if end - begin != expected:
            raise ValueError(
                f"{path}: tensor {name} of dtype {dtype} and shape {list(shape)} needs {expected} "
                f"bytes, its offsets [{begin}, {end}) hold {end - begin}"
            )
        tensors.append((begin, end, name, dtype, shape))
    tensors.sort(key=lambda tensor: tensor[:2])
    _check_coverage(path, [t[:3] for t in tensors], file_size - data_begin)
    return {
        name: SafetensorsTensor(name, shape, dtype, path, data_begin + begin, mapping)
        for begin, _, name, dtype, shape in tensors
    }


def open_safetensors_dir(directory: Path) -> dict[str, SafetensorsTensor]:
    """All tensors of a checkpoint directory: one file, or the shards its index names.

    Raises FileNotFoundError naming the missing files, or ValueError as `open_safetensors`, on an
    index that does not agree with its shards, and on a tensor held by two shards.
    """
    if (directory / SINGLE_NAME).exists():
        return open_safetensors(directory / SINGLE_NAME)
    index_path = directory / INDEX_NAME
    if not index_path.exists():
        raise FileNotFoundError(
            f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; other weight formats must "
            "be converted to safetensors first"
        )
    weight_map = _read_index(index_path)
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (directory / shard).exists()]:
        raise FileNotFoundError(f"{directory} lacks the shards {', '.join(missing)}")
    tensors: dict[str, SafetensorsTensor] = {}
    for shard in shards:
        opened = open_safetensors(directory / shard)
        if twice := sorted(tensors.keys() & opened.keys()):
            raise ValueError(f"{directory / shard}: tensors also in another shard: {twice}")
        tensors |= opened
    absent = [f"{n} ({shard})" for n, shard in weight_map.items() if n not in tensors]
    if absent:
        raise ValueError(f"{index_path}: tensors that no shard holds: {', '.join(absent)}")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        valid = all(Path(shard).name == shard for shard in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: corrupt safetensors index: {error!r}") from error
    if not valid:
        raise ValueError(f"{path}: shards must be plain file names beside the index")
    return dict(weight_map)


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
        raise ValueError(f"{path}: corrupt safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: corrupt safetensors header: it is no JSON object")
    header.pop("__metadata__", None)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key appears twice")
    return unique


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: corrupt header entry of tensor {name}: {entry!r}") from error
    sizes = (*shape, begin, end)
    if not all(type(size) is int and size >= 0 for size in sizes) or end < begin:
        raise ValueError(
            f"{path}: corrupt header entry of tensor {name}: shape {list(shape)}, "
            f"offsets [{begin}, {end})"
        )
    if dtype not in _ITEM_SIZES:
        raise ValueError(f"{path}: tensor {name} has unknown dtype {dtype!r}")
    return dtype, shape, (begin, end)


def _check_coverage(path: Path, extents: list[tuple[int, int, str]], data_size: int) -> None:
    """Tensors must follow each other without gap or overlap and end where the file ends."""
    position = 0
    for begin, end, name in extents:
        if begin != position:
            what = "overlaps" if begin < position else "leaves a gap behind"
            raise ValueError(
                f"{path}: tensor {name} at offsets [{begin}, {end}) {what} the tensor before it, "
                f"which ends at {position}"
            )
        if end > data_size:
            raise ValueError(
                f"{path}: truncated: tensor {name} ends at byte {end} of the data, "
                f"the file has {data_size}"
            )
        position = end
    if position != data_size:
        raise ValueError(
            f"{path}: the tensors take {position} bytes of data, the file has {data_size}"
        )
