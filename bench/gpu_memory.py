"""Memory of a GPU that this process holds."""

from __future__ import annotations

import os
from typing import Any

from nanoflow import _core
from nanoflow.energy import open_boards
from nanoflow.errors import EngineError

OF_PROCESS = "of this process, by NVML"
OF_DEVICE = "what the device has less of free since the start"  # other processes change it, too


class GpuMemory:
    """Reads it, where NVML knows this process (from within a container it may not), else how much
    less the device has free than when this was made. `source`: which of the two."""

    def __init__(self, device: str) -> None:
        """`device`: "cuda" or "cuda:N". Raises EngineError on one that cannot be used."""
        self._backend = _core.Backend(device)  # from now on this process is one of the device's
        self._free_before = self._backend.free_memory
        self._nvml, self._board = _open_board(device)
        self.source = OF_DEVICE if self._of_process() is None else OF_PROCESS

    def used(self) -> int:
        """Bytes. Raises EngineError where NVML has lost a process that it knew."""
        if self.source == OF_DEVICE:
            return self._free_before - self._backend.free_memory
        used = self._of_process()
        if used is None:
            raise EngineError(f"NVML no longer says what process {os.getpid()} holds of the GPU")
        return used

    def _of_process(self) -> int | None:
        if self._nvml is None:
            return None
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._board)
        except self._nvml.NVMLError:
            return None
        used = [one.usedGpuMemory for one in processes if one.pid == os.getpid()]
        return None if not used or None in used else sum(used)


def _open_board(device: str) -> tuple[Any, Any]:
    """NVML and its handle of the device; twice None without either."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        return pynvml, open_boards(pynvml, device, 1)[0]
    except pynvml.NVMLError:
        return None, None
