"""What a GPU takes from the socket, as NVML tells it."""

from __future__ import annotations

import os
from typing import Any


class EnergyMeter:
    """Of one GPU. Safe to use from several threads."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    def joules(self) -> float | None:
        """Since the driver was loaded; None where the GPU does not say."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) * 1e-3
        except self._nvml.NVMLError:
            return None

    def watts(self) -> float | None:
        """At this moment; None where the GPU does not say."""
        try:
            return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) * 1e-3
        except self._nvml.NVMLError:
            return None


def open_meter(device: str) -> EnergyMeter | None:
    """Of the device of a backend; None of a CPU, and without NVML (nvidia-ml-py)."""
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return EnergyMeter(pynvml, gpu_handle(pynvml, device))
    except pynvml.NVMLError:
        return None


def gpu_handle(nvml: Any, device: str) -> Any:
    """NVML counts all GPUs of the machine, CUDA those that CUDA_VISIBLE_DEVICES names."""
    index = int(device.partition(":")[2] or 0)
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = visible[index] if index < len(visible) and visible[0] else str(index)
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)
