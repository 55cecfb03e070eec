"""A disk that fails as told."""

from __future__ import annotations

import errno
import time

from nanoflow.offload.page_file import PageFile


class FaultyFile(PageFile):
    """Calls until it fails, and how long a read takes."""

    writes_left = 10**9
    reads_left = 10**9
    read_seconds = 0.0

    def _write(self, page: memoryview, offset: int) -> int:
        self.writes_left -= 1
        if self.writes_left < 0:
            raise OSError(errno.ENOSPC, "no space left on device")
        return super()._write(page, offset)

    def _read(self, page: memoryview, offset: int) -> int:
        time.sleep(self.read_seconds)
        self.reads_left -= 1
        if self.reads_left < 0:
            raise OSError(errno.EIO, "input/output error")
        return super()._read(page, offset)
