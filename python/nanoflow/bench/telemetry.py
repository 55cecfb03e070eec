"""Power and clock of GPUs while something is measured."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any

from nanoflow.energy import open_boards
from nanoflow.errors import EngineError

SAMPLES_PER_SECOND = 50  # a board counts its energy up about ten times a second


@dataclass(frozen=True, slots=True)
class Sample:
    time: float  # seconds of time.perf_counter
    joules: float  # of all boards, since the driver was loaded
    sm_mhz: float  # their mean


@dataclass(frozen=True, slots=True)
class Power:
    """Means over a span of time."""

    watts: float  # of all boards
    sm_mhz: float  # of a board


def power(samples: Sequence[Sample], begin: float, end: float) -> Power | None:
    """Between two times of time.perf_counter; None where the energy was not counted up twice there.

    From one such moment to another, for the counter stands still between them.
    """
    inside = [sample for sample in samples if begin <= sample.time <= end]
    counted = [
        sample
        for before, sample in itertools.pairwise(samples)
        if begin <= sample.time <= end and sample.joules != before.joules
    ]
    if len(counted) < 2:
        return None
    first, last = counted[0], counted[-1]
    watts = (last.joules - first.joules) / (last.time - first.time)
    return Power(watts, sum(sample.sm_mhz for sample in inside) / len(inside))


class Telemetry:
    """Samples the GPUs of all ranks in a thread of its own, from entry to exit.

    `reason` says why there is nothing to sample: a CPU, or no NVML (pip install 'nanoflow[bench]').
    """

    def __init__(self, device: str, ranks: int = 1) -> None:
        """`device`: of the first rank, "cpu", "cuda" or "cuda:N"; the others' come after it."""
        self.samples: list[Sample] = []
        self.board: dict[str, Any] = {}  # what does not change
        self.reason: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._nvml: Any = None
        if not device.startswith("cuda"):
            self.reason = "only GPUs are sampled"
            return
        try:
            import pynvml

            self._nvml, self._boards = pynvml, open_boards(pynvml, device, ranks)
            limits = map(pynvml.nvmlDeviceGetPowerManagementLimit, self._boards)
            self.board = {
                "driver": pynvml.nvmlSystemGetDriverVersion(),
                "boards": len(self._boards),
                "power_limit_watts": sum(limits) * 1e-3,
            }
            self._sample()
        except ImportError:
            self.reason = "nvidia-ml-py is not installed: pip install 'nanoflow[bench]'"
        except EngineError as error:
            self.reason = str(error)
        except pynvml.NVMLError as error:
            self.reason = f"NVML: {error}"

    def power(self, begin: float, end: float) -> Power | None:
        return power(list(self.samples), begin, end)

    def mean_power(self, spans: Sequence[tuple[float, float]]) -> Power | None:
        """Over spans of time of which each is long enough for itself."""
        found = [self.power(begin, end) for begin, end in spans]
        whole = sum(end - begin for begin, end in spans)
        watts = mhz = 0.0
        for one, (begin, end) in zip(found, spans, strict=True):
            if one is None:
                return None
            watts += one.watts * (end - begin) / whole
            mhz += one.sm_mhz * (end - begin) / whole
        return Power(watts, mhz)

    def __enter__(self) -> Telemetry:
        if self.reason is None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(1 / SAMPLES_PER_SECOND):
            try:
                self._sample()
            except self._nvml.NVMLError as error:
                self.reason = f"NVML: {error}"
                return

    def _sample(self) -> None:
        nvml = self._nvml
        millijoules = sum(map(nvml.nvmlDeviceGetTotalEnergyConsumption, self._boards))
        mhz = [nvml.nvmlDeviceGetClockInfo(one, nvml.NVML_CLOCK_SM) for one in self._boards]
        self.samples.append(Sample(perf_counter(), millijoules * 1e-3, sum(mhz) / len(mhz)))
