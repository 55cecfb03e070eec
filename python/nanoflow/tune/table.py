"""What ops take on one device, alone and sustained: measured by `nanoflow tune`, kept as JSON.

A GPU under load sits at its power cap with its clock lowered, so every entry says at which power
and clock it was measured. From these come, at any clock,

- the time: of what computes it stretches as the clock falls, of what waits for memory it does not;
  Between the sizes and widths that were measured, products take whole waves of tiles where the
  table says what kernels they ran on;
- the energy above idle, which the cap is shared out of: at a lower clock the voltage is lower, so
  the same work takes less, by a power of the clock.

An op on a part of the device takes the energy that it takes on all of it: the same is switched.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanoflow import _core
from nanoflow.tune.simulate import Cost, LaneWidths

_LAUNCH_US = 3.0  # of an op without work


@dataclass(frozen=True, slots=True)
class Entry:
    """An op on a lane of `width`; what `size` counts depends on the op, see OpTable."""

    size: float
    width: int
    us: float  # sustained
    watts: float  # of the whole device, idle included
    mhz: float


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product by the rows of its left side: entries of x [size, depth] by
    weightᵀ [features, depth]."""

    features: int
    depth: int
    entries: tuple[Entry, ...]
    is_general: bool = False  # of kernels for any type: see _core.cuda_gemm_us


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A whole step of a model, sustained."""

    model: Mapping[str, Any]  # fields of Spec, in nanoflow/tune/costs.py
    schedule: Mapping[str, Any]  # as JSON
    load: Mapping[str, int]  # fields of Load, there
    us: float


@dataclass(frozen=True, slots=True)
class OpTable:
    """All that the search knows of a device. Attention is of one layer."""

    device: str  # as in "NVIDIA H100 80GB HBM3"
    width: int
    width_step: int  # lanes are as wide as multiples of it
    idle_watts: float
    cap_watts: float  # what the device takes when its limit lowers the clock; 0: nothing does
    max_mhz: float
    products: tuple[Product, ...]
    decode: tuple[Entry, ...]  # by bytes of keys and values read
    prefill: tuple[Entry, ...]  # by FLOPs of scores and sums
    rows: tuple[Entry, ...]  # norms, rotation and other work on rows, by bytes moved
    slowdown: Mapping[tuple[str, str], float] = field(default_factory=dict)  # see LaneWidths
    steps: tuple[MeasuredStep, ...] = ()  # with these kernels: what predictions are held against
    origin: Mapping[str, str] = field(default_factory=dict)  # how it was measured
    energy_exponent: float = 0.0  # the same work takes joules in proportion to the clock to this
    row_granularity: int = 1  # of the backend: what rows are padded to
    kernels: str = ""  # of products: "cuda" where _core.cuda_gemm_us knows their tiles
    # What memory lets through to attention and products side by side, of what decodes alone read on
    # the whole device. From steps of Llama-2-7B on an H200: tests/python/test_tune_search.py.
    shared_memory_rate: float = 0.92

    def interference(self) -> LaneWidths:
        """What ops side by side do to each other."""
        if not self.decode:
            return LaneWidths(self.slowdown)
        most = max(self.decode, key=lambda entry: (entry.width, entry.size))
        return LaneWidths(self.slowdown, self.shared_memory_rate * most.size / most.us)

    def product(self, rows: int, features: int, depth: int, width: int, clock: float = 1.0) -> Cost:
        """By the measured shape most like this one, in proportion to their weights.

        `clock`, here and below: of the full one.
        """

        def unlike(product: Product) -> float:
            return _ratio(product.features, features) * _ratio(product.depth, depth)

        nearest = min(self.products, key=unlike)
        scale = features * depth / (nearest.features * nearest.depth)
        us, joules = self._computed(nearest.entries, rows, width, clock)
        if self.kernels:
            us = self._in_waves(nearest, rows, width) / clock
        return Cost(us * scale, joules * scale, "compute")

    def attention(self, kv_bytes: float, flops: float, width: int, clock: float = 1.0) -> Cost:
        """Of decodes that read so many bytes, and prompts of so many FLOPs, one after the other."""
        us = joules = 0.0
        if kv_bytes > 0:
            us, joules = self._read(kv_bytes, width, clock)
        if flops > 0:
            more = self._computed(self.prefill, flops, width, clock, floor_us=_LAUNCH_US)
            us, joules = us + more[0], joules + more[1]
        return Cost(us, joules, "memory", moved=kv_bytes)

    def row_work(self, moved: float, width: int, clock: float = 1.0) -> Cost:
        us, joules = self._computed(self.rows, moved, width, clock, floor_us=_LAUNCH_US)
        return Cost(us, joules, "compute")

    def lets_through(self, us: float, joules: float) -> bool:
        """Whether the cap leaves the clock to work of so many joules above idle in that time."""
        if self.cap_watts <= self.idle_watts:
            return True
        return joules * 1e6 <= us * (self.cap_watts - self.idle_watts)

    def _in_waves(self, product: Product, rows: int, width: int) -> float:
        """µs at full clock: what the model of the kernels says, times how far it was off where
        sizes and widths nearby were measured."""

        def model(rows: int, width: int) -> float:
            shape = product.features, product.depth
            return _core.cuda_gemm_us(rows, *shape, width, product.is_general)

        off = []
        for at in sorted({entry.width for entry in product.entries}):
            points = sorted(
                (e.size, e.us * self.clock_of(e.mhz) / model(round(e.size), at), 0.0)
                for e in product.entries
                if e.width == at
            )
            off.append((at, *_between(points, rows)))
        return _between(off, width)[0] * model(rows, width)

    def clock_of(self, mhz: float) -> float:
        """Of the full one."""
        return mhz / self.max_mhz if self.max_mhz else 1.0

    def _computed(
        self,
        entries: Sequence[Entry],
        size: float,
        width: int,
        clock: float,
        *,
        floor_us: float | None = None,
    ) -> tuple[float, float]:
        """µs and joules of what stretches as the clock falls."""
        points = [
            (at, *self._at_size([e for e in entries if e.width == at], size, floor_us))
            for at in sorted({entry.width for entry in entries})
        ]
        us, _ = _between(points, width)
        joules = points[-1][2]
        if width < points[0][0]:  # narrower than measured: time in proportion
            us *= points[0][0] / width
        return us / clock, joules * clock**self.energy_exponent

    def _read(self, size: float, width: int, clock: float) -> tuple[float, float]:
        """µs and joules of decodes. On all of the device they wait for memory, at any clock. On a
        part of it each SM takes so many bytes a cycle at most: what the narrowest lanes show."""
        widths = sorted({entry.width for entry in self.decode})
        whole = [entry for entry in self.decode if entry.width == widths[-1]]
        memory_us, joules = self._at_size(whole, size, _LAUNCH_US, stretches=False)
        busy = [  # SMs x µs at full clock
            at * self._at_size([e for e in self.decode if e.width == at], size, _LAUNCH_US)[0]
            for at in widths[:-1]
            if at <= max(width, widths[0])
        ]
        if not busy:
            return memory_us * max(1.0, widths[-1] / width), joules * clock**self.energy_exponent
        us = max(memory_us, min(busy) / (width * clock))
        return us, joules * clock**self.energy_exponent

    def _at_size(
        self,
        entries: Iterable[Entry],
        size: float,
        floor_us: float | None,
        *,
        stretches: bool = True,
    ) -> tuple[float, float]:
        """µs and joules at full clock. Above what was measured both grow in proportion; below, they
        go down to a floor, or stay where there is none: few rows read all weights too. What the two
        least sizes say of none at all is more than the floor where starting and ending takes long.
        """
        points = []
        for e in entries:
            clock = self.clock_of(e.mhz)
            joules = (e.watts - self.idle_watts) * e.us * 1e-6 / clock**self.energy_exponent
            points.append((e.size, e.us * clock if stretches else e.us, joules))
        points.sort()
        if floor_us is not None:
            if len(points) > 1:
                (size0, us0, _), (size1, us1, _) = points[:2]
                floor_us = max(floor_us, us0 - size0 * (us1 - us0) / (size1 - size0))
            points.insert(0, (0.0, floor_us, 0.0))
        us, joules = _between(points, size)
        beyond = max(1.0, size / points[-1][0])
        return us * beyond, joules * beyond


def _between(points: Sequence[tuple[float, float, float]], x: float) -> tuple[float, float]:
    """The two values at x, on straight lines; those of the first or last point outside."""
    i = bisect_left([point[0] for point in points], x)
    if i == 0 or i == len(points):
        _, y, z = points[min(i, len(points) - 1)]
        return y, z
    (x0, y0, z0), (x1, y1, z1) = points[i - 1], points[i]
    t = (x - x0) / (x1 - x0)
    return y0 + (y1 - y0) * t, z0 + (z1 - z0) * t


def _ratio(a: float, b: float) -> float:
    return max(a / b, b / a)


def table_to_json(table: OpTable) -> dict[str, Any]:
    content = asdict(table)
    content["slowdown"] = [
        {"op": op, "beside": beside, "factor": factor}
        for (op, beside), factor in table.slowdown.items()
    ]
    return content


def table_from_json(content: Mapping[str, Any]) -> OpTable:
    """Raises KeyError or TypeError where it is no table."""
    fields = dict(content)
    fields["products"] = tuple(
        Product(**{**product, "entries": _entries(product["entries"])})
        for product in content["products"]
    )
    for name in ("decode", "prefill", "rows"):
        fields[name] = _entries(content[name])
    fields["steps"] = tuple(MeasuredStep(**step) for step in content["steps"])
    fields["slowdown"] = {
        (item["op"], item["beside"]): item["factor"] for item in content["slowdown"]
    }
    return OpTable(**fields)


def save_table(table: OpTable, path: Path) -> None:
    path.write_text(json.dumps(table_to_json(table), indent=1) + "\n", encoding="utf-8")


def load_table(path: Path) -> OpTable:
    """Raises ValueError naming the file where it is no table."""
    try:
        return table_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of op times: {error!r}") from error


def _entries(content: Iterable[Mapping[str, Any]]) -> tuple[Entry, ...]:
    return tuple(Entry(**entry) for entry in content)


def shipped_table(device: str) -> OpTable | None:
    """The table that comes with the package for a device of this name, if there is one."""
    for path in sorted((Path(__file__).parent / "tables").glob("*.json")):
        table = load_table(path)
        if table.device == device:
            return table
    return None
