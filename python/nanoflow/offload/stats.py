"""What the tiers count, for metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum


class Transfer(Enum):
    """A way between tiers; the value is vLLM's transfer_type."""

    STORE = "GPU_to_CPU"
    LOAD = "CPU_to_GPU"
    WRITE = "CPU_to_SSD"
    READ = "SSD_to_CPU"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Since the start."""

    bytes: int = 0
    seconds: float = 0.0  # that the copying itself took; of the SSD, summed over its threads

    def plus(self, size: int, seconds: float) -> Traffic:
        return Traffic(self.bytes + size, self.seconds + seconds)


@dataclass(slots=True)
class OffloadStats:
    """Since the start; the scheduler's thread alone counts."""

    queries: int = 0  # tokens of requests looked for below the device
    hits: dict[str, int] = field(default_factory=lambda: {"host": 0, "ssd": 0})  # of them, found
    resumed: int = 0  # tokens of preempted requests that came back instead of being recomputed
    traffic: dict[Transfer, Traffic] = field(
        default_factory=lambda: {transfer: Traffic() for transfer in Transfer}
    )
    usage: Mapping[str, float] = field(default_factory=dict)  # share of each tier that is used
    errors: dict[str, int] = field(default_factory=dict)  # by what went wrong

    @property
    def num_hits(self) -> int:
        return sum(self.hits.values())

    def add(self, transfer: Transfer, size: int, seconds: float) -> None:
        self.traffic[transfer] = self.traffic[transfer].plus(size, seconds)

    def snapshot(self, usage: Mapping[str, float]) -> OffloadStats:
        return replace(
            self,
            hits=dict(self.hits),
            traffic=dict(self.traffic),
            usage=usage,
            errors=dict(self.errors),
        )
