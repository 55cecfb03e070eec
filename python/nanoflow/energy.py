"""What GPUs take from the socket, as NVML tells it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanoflow import _core
from nanoflow.errors import EngineError


class EnergyMeter:
    """Of the GPUs that share a model, in sum. Safe to use from several threads."""

    def __init__(self, nvml: Any, handles: Sequence[Any]) -> None:
        self._nvml = nvml
        self._handles = handles

    def joules(self) -> float | None:
        """Since the driver was loaded; None where a GPU does not say."""
        return self._sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption)

    def watts(self) -> float | None:
        """At this moment; None where a GPU does not say."""
        return self._sum(self._nvml.nvmlDeviceGetPowerUsage)

    def _sum(self, milli: Any) -> float | None:
        try:
            return sum(float(milli(handle)) for handle in self._handles) * 1e-3
        except self._nvml.NVMLError:
            return None


def open_meter(device: str, ranks: int = 1) -> EnergyMeter | None:
    """Of the devices of so many ranks, the first of which is given; None of a CPU, and without NVML
    (nvidia-ml-py)."""
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        return EnergyMeter(pynvml, open_boards(pynvml, device, ranks))
    except (pynvml.NVMLError, EngineError):
        return None


def open_boards(nvml: Any, device: str, ranks: int) -> list[Any]:
    """NVML's handles of the devices from "cuda" or "cuda:N" on, one a rank.

    NVML counts all GPUs of the machine in the order of the bus, CUDA those that
    CUDA_VISIBLE_DEVICES leaves, in an order of its own: what both know is the bus id. Raises
    NVMLError, and EngineError where CUDA has no such device.
    """
    nvml.nvmlInit()
    first = int(device.partition(":")[2] or 0)
    return [
        nvml.nvmlDeviceGetHandleByPciBusId(_core.cuda_bus_id(index))
        for index in range(first, first + ranks)
    ]
