"""What a schedule's nano-batches take, from a device's table and the model's shape."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from nanoflow._core import Schedule, padded_rows
from nanoflow.tune.program import Program, parts_of, program_of
from nanoflow.tune.simulate import Cost, steady
from nanoflow.tune.table import OpTable

_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_experts",
    "experts_per_token",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "dtype",
)
# Of the full clock. A step is simulated at both, and at lower ones where power forces it there; its
# time is on straight lines between them, over the length of a cycle.
_LOW_CLOCK = 0.7
_MOST_CLOCKS = 4
_LEAST_CLOCK = 0.01
_HALVINGS = 30  # of what is between the least and the full one


class Spec(Protocol):
    """What is needed of `_core.ModelSpec`."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def experts_per_token(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def dtype(self) -> str: ...


def shape_of(spec: Spec) -> dict[str, int | str]:
    """The fields of Spec by name."""
    return {name: getattr(spec, name) for name in _SHAPE}


@dataclass(frozen=True, slots=True)
class Load:
    """What a step computes, on the average of its requests."""

    decodes: int  # requests of one row each
    context: int  # keys that each of them reads
    prefill_rows: int = 0
    prefill_context: int = 0  # keys that each of those rows reads

    @property
    def rows(self) -> int:
        return self.decodes + self.prefill_rows


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one step: layers and head."""

    step_us: float
    layer_us: float  # of a layer in the middle
    clock_us: float  # what the step would take at full clock; less where power is what limits
    joules: float  # above idle
    clock: float = 1.0  # of the full one: as high as power lets it be

    def tokens_per_second(self, load: Load) -> float:
        return load.rows / self.step_us * 1e6


@dataclass(frozen=True, slots=True)
class _Step:
    """At one clock."""

    us: float
    layer_us: float
    joules: float


class CostModel:
    """Costs of one model on one device."""

    def __init__(self, table: OpTable, spec: Spec) -> None:
        self.table = table
        self.spec = spec
        self._interference = table.interference()
        self._bytes = 4 if spec.dtype == "float32" else 2
        self._memo: dict[tuple[str, float, int, Load, float], Cost] = {}

    def stage(self, stage: str, share: float, width: int, load: Load, clock: float = 1.0) -> Cost:
        """Of a nano-batch with this share of the step's rows and keys, on a lane of this width.

        `clock`, here and below: of the full one.
        """
        key = (stage, share, width, load, clock)
        if key not in self._memo:
            self._memo[key] = self._stage(*key)
        return self._memo[key]

    def costs(self, schedule: Schedule, load: Load, clock: float = 1.0) -> list[Cost]:
        """Of the tasks of `program_of(schedule)`."""
        bounds = [0.0, *schedule.cuts(), 1.0]
        costs = []
        for part in parts_of(schedule):
            lane = schedule.lanes[schedule.lane_of(part.stage, part.number)]
            share = bounds[part.end] - bounds[part.begin]
            costs.append(self.stage(part.stage, share, lane.width, load, clock))
        return costs

    def head(self, schedule: Schedule, load: Load, clock: float = 1.0) -> Cost:
        width = schedule.lanes[schedule.lane_of("head", 0)].width
        shape = self.spec.vocab_size, self.spec.hidden_size
        return self._product(self._padded(load.decodes), *shape, width, clock)

    def predict(self, schedule: Schedule, load: Load, program: Program | None = None) -> Prediction:
        """Raises ValueError for an order that the planner would refuse.

        `program` stands for the schedule's own, with another order.
        """
        program = program or program_of(schedule)
        full = self._step(schedule, load, program, 1.0)
        if self.table.lets_through(full.us, full.joules):
            return Prediction(full.us, full.layer_us, full.us, full.joules)
        known = {1.0: full}
        clock = _LOW_CLOCK
        while clock < min(known) and len(known) < _MOST_CLOCKS:  # else it lies between two of them
            known[clock] = self._step(schedule, load, program, clock)
            clock = self._clock(known)
        step = self._between(known, clock)
        return Prediction(step.us, step.layer_us, full.us, step.joules, clock)

    def _clock(self, known: Mapping[float, _Step]) -> float:
        """The highest that power lets through."""
        below, above = _LEAST_CLOCK, 1.0
        for _ in range(_HALVINGS):
            clock = (below + above) / 2
            step = self._between(known, clock)
            if self.table.lets_through(step.us, step.joules):
                below = clock
            else:
                above = clock
        return below

    def _between(self, known: Mapping[float, _Step], clock: float) -> _Step:
        """By the two known clocks around this one, or the two lowest."""
        clocks = sorted(known)
        at = min(max(1, bisect_left(clocks, clock)), len(clocks) - 1)
        low, high = clocks[at - 1], clocks[at]
        part = (1 / clock - 1 / high) / (1 / low - 1 / high)
        fast, slow = known[high], known[low]
        return _Step(
            fast.us + (slow.us - fast.us) * part,
            fast.layer_us + (slow.layer_us - fast.layer_us) * part,
            known[1.0].joules * clock**self.table.energy_exponent,
        )

    def _step(self, schedule: Schedule, load: Load, program: Program, clock: float) -> _Step:
        costs = self.costs(schedule, load, clock)
        head = self.head(schedule, load, clock)
        found, layers = steady(program, costs, self._interference), self.spec.num_layers
        joules = sum(cost.joules for cost in costs) * layers + head.joules
        return _Step(found.layers_us(layers) + head.us, found.period_us, joules)

    def _padded(self, rows: int) -> int:
        """As a step's rows are, before its nano-batches share them."""
        return padded_rows(max(1, rows), self.table.row_granularity)

    def _stage(self, stage: str, share: float, width: int, load: Load, clock: float) -> Cost:
        spec, table = self.spec, self.table
        hidden = spec.hidden_size
        heads = spec.num_heads * spec.head_dim
        qkv = heads + 2 * spec.num_kv_heads * spec.head_dim
        rows = max(1, round(share * self._padded(load.rows)))
        row_bytes = rows * self._bytes
        norm = table.row_work(2 * row_bytes * hidden, width, clock)
        if stage == "qkv":
            rotation = table.row_work(2 * row_bytes * qkv, width, clock)
            return _sum(norm, self._product(rows, qkv, hidden, width, clock), rotation)
        if stage == "o":
            return self._product(rows, hidden, heads, width, clock)
        if stage == "mlp":
            return _sum(norm, self._mlp(rows, width, clock))
        keys = 2 * spec.num_kv_heads * spec.head_dim * self._bytes
        read = share * load.decodes * load.context * keys
        flops = 4 * share * load.prefill_rows * load.prefill_context * heads
        return table.attention(read, flops, width, clock)

    def _product(self, rows: int, features: int, depth: int, width: int, clock: float) -> Cost:
        """Reads its weights, once."""
        cost = self.table.product(rows, features, depth, width, clock)
        return replace(cost, moved=features * depth * self._bytes)

    def _mlp(self, rows: int, width: int, clock: float) -> Cost:
        """With experts, those that rows reach multiply one after another, each an equal share."""
        spec, table = self.spec, self.table
        hidden, wide = spec.hidden_size, spec.intermediate_size
        pairs, reached = rows, 1
        moved = []
        if spec.num_experts > 0:
            pairs = rows * spec.experts_per_token
            reached = min(spec.num_experts, pairs)
            out_and_back = 4 * pairs * hidden * self._bytes
            moved = [table.row_work(out_and_back, width, clock)]
        share = max(1, round(pairs / reached))
        products = (
            self._product(share, 2 * wide, hidden, width, clock),
            self._product(share, hidden, wide, width, clock),
        )
        return _sum(*moved, *(product for product in products for _ in range(reached)))


def _sum(*costs: Cost) -> Cost:
    return Cost(
        sum(cost.us for cost in costs),
        sum(cost.joules for cost in costs),
        moved=sum(cost.moved for cost in costs),
    )
