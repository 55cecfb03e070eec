"""Pages at fixed places in one file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import xxhash


class DamagedPageError(Exception):
    """A page is not what was written."""


class PageFile:
    """Reads and writes whole pages, past the system's cache where the file system allows that.

    Any thread may call; two must not write the same place at once. Where pages are multiples of
    4096 bytes, they must be aligned to as many in memory.
    """

    def __init__(self, path: Path, page_bytes: int) -> None:
        """Opens or creates the file. Raises OSError."""
        self._page_bytes = page_bytes
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        direct = getattr(os, "O_DIRECT", 0) if page_bytes % 4096 == 0 else 0
        try:
            self._file = os.open(path, flags | direct, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which says that there is no O_DIRECT here
                raise
            self._file = os.open(path, flags, 0o600)

    def write(self, place: int, page: memoryview, key: bytes) -> int:
        """Writes a page and returns its checksum, which holds for `key` alone. Raises OSError."""
        written = 0
        while written < self._page_bytes:
            offset = place * self._page_bytes + written
            count = self._write(page[written:], offset)
            if count <= 0:
                raise OSError(errno.EIO, "nothing was written")
            written += count
        return _checksum(page, key)

    def read(self, place: int, page: memoryview, key: bytes, checksum: int) -> None:
        """Reads a page. Raises OSError, and DamagedPageError on a page that is cut or changed."""
        count = self._read(page, place * self._page_bytes)
        if count != self._page_bytes:
            raise DamagedPageError(f"page {place} ends after {count} of {self._page_bytes} bytes")
        if _checksum(page, key) != checksum:
            raise DamagedPageError(f"page {place} has another checksum than it was written with")

    def sync(self) -> None:
        """Returns when all that was written will survive a loss of power. Raises OSError."""
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _write(self, page: memoryview, offset: int) -> int:
        return os.pwrite(self._file, page, offset)

    def _read(self, page: memoryview, offset: int) -> int:
        return os.preadv(self._file, [page], offset)


def _checksum(page: memoryview, key: bytes) -> int:
    """64 bits; at some tens of GB/s on a core it is no part of the time that a disk takes."""
    return xxhash.xxh3_64_intdigest(page, seed=int.from_bytes(key[:8], "little"))
