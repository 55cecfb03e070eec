"""What the loader reads: named tensors that hand out their rows in chunks of bounded memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any, Protocol

from numpy.typing import NDArray

CHUNK_BYTES = 64 << 20


class CheckpointTensor(Protocol):
    """A tensor of a checkpoint, read lazily."""

    @property
    def name(self) -> str:
        """Hugging Face name, e.g. model.layers.0.mlp.up_proj.weight."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """Name of the stored dtype, as the file format spells it."""

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first row, rows) from the first row to the last.

        Rows are float32, float16, or uint16 holding bfloat16 bits, C-contiguous, at most about
        `max_bytes` at a time, and valid only until the next chunk is asked for: behind it the pages
        of the file are given back.
        """


def row_ranges(rows: int, row_bytes: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """[begin, end) ranges that cover all rows, each of at most `max_bytes` but at least one row."""
    step = max(1, max_bytes // max(1, row_bytes))
    for begin in range(0, rows, step):
        yield begin, min(rows, begin + step)


def release_pages(mapping: mmap.mmap, begin: int, end: int) -> None:
    """Drops the resident pages of bytes [begin, end) of a read-only file mapping.

    Only the process' own memory shrinks: the data stay in the page cache, and neighbours that share
    a page are read back on their next use.
    """
    if end <= begin or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = begin - begin % mmap.PAGESIZE
    mapping.madvise(mmap.MADV_DONTNEED, first, end - first)
