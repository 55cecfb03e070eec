"""From runs of a model's own steps to a table of op times.

Products and attention are timed alone, on lanes that part the device between them: a step that is
not cut runs one after the other, whatever lanes it uses. What they do to each other is seen in
steps of two halves in ping-pong, which do the same work at several clocks and so show what the
clock does to its energy. The energy of attention is what a step of decodes takes beyond a step of
as many prompt rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import exp, log
from statistics import linear_regression, mean

from nanoflow import _core
from nanoflow.mixed_step import StepMix, deal_step
from nanoflow.schedule import built_in_schedule, schedule_to_json
from nanoflow.tune.costs import CostModel, Load, Spec, shape_of
from nanoflow.tune.measure import Run
from nanoflow.tune.program import parts_of
from nanoflow.tune.search import parted, ping_pong
from nanoflow.tune.table import Entry, MeasuredStep, OpTable, Product

Measure = Callable[[_core.Schedule, StepMix], Run]
STAGES_OF_PRODUCTS = ("qkv", "o", "mlp")
_THROTTLED = 0.97  # of the full clock: below it the power limit is what counts
_EXPONENT = 1.0  # of the clock, in the energy of the same work, where steps do not tell
# More is an error of measurement: energy goes with the square of the voltage, which falls with the
# clock, but not as far.
MOST_EXPONENT = 2.0


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured."""

    rows: Sequence[int]  # of steps of prompts, ascending
    decodes: Sequence[int]  # of steps of decodes, ascending
    context: int  # keys of each decode; tokens of a prompt, at most
    widths: Sequence[int]  # of the lane of attention, beside the rest for all else

    @property
    def prefills(self) -> list[StepMix]:
        return [StepMix(0, self.context, rows) for rows in self.rows]

    @property
    def decode_steps(self) -> list[StepMix]:
        return [StepMix(decodes, self.context) for decodes in self.decodes]

    @property
    def full(self) -> StepMix:
        """As many rows of prompts as of decodes, as far as the grid goes."""
        return StepMix(self.decodes[-1], self.context, min(self.decodes[-1], self.rows[-1]))

    @property
    def runs(self) -> int:
        alone = len(self.rows) + len(self.decodes)
        return alone + len(self.widths) * (len(self.decodes) + 2)


def load_of(mix: StepMix) -> Load:
    """As the cost model counts it."""
    return Load(mix.decodes, mix.context, mix.prefill_rows, round(_prefill_keys(mix)))


def _prefill_keys(mix: StepMix) -> float:
    """That a row of a prompt reads, in the mean."""
    if mix.prefill_rows == 0:
        return 0.0
    step = deal_step(replace(mix, decodes=0), [])
    return float((step.rows * (step.rows + 1) / 2).sum() / mix.prefill_rows)


@dataclass(slots=True)
class _Collected:
    products: dict[tuple[int, int], list[Entry]] = field(default_factory=dict)
    general: set[tuple[int, int]] = field(default_factory=set)
    decode: list[Entry] = field(default_factory=list)
    prefill: list[Entry] = field(default_factory=list)
    rows: list[Entry] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Device:
    """What a table says of its device; see OpTable."""

    name: str
    width: int
    width_step: int
    idle_watts: float
    limit_watts: float  # 0: none is known
    row_granularity: int = 1  # this and the next as in OpTable
    kernels: str = ""


def profile(
    measure: Measure, spec: Spec, device: Device, grid: Grid, origin: Mapping[str, str]
) -> OpTable:
    """Runs the grid; the table's steps are those of two halves in ping-pong. Raises EngineError on
    widths that the device does not have, ValueError on a model whose layers are not dense."""
    profiler = _Profiler(spec)
    runs: list[Run] = []
    whole: list[tuple[StepMix, Run]] = []  # decodes on all of the device
    sequential = built_in_schedule("sequential", device.width)
    for mix in grid.prefills:
        runs.append(run := measure(sequential, mix))
        profiler.add_products(run, mix, device.width)
        profiler.add_prefill(run, mix, device.width)
    for mix in grid.decode_steps:
        runs.append(run := measure(sequential, mix))
        profiler.add_head(run, mix, device.width)
        whole.append((mix, run))
    for width in grid.widths:
        apart = parted((1, 1, 1, 1), 0.5, width, device.width)
        for mix in grid.decode_steps:
            runs.append(run := measure(apart, mix))
            profiler.add_products(run, mix, device.width - width)
            profiler.add_decode(run, mix, width, run.watts)
        runs.append(run := measure(apart, grid.prefills[-1]))
        profiler.add_products(run, grid.prefills[-1], device.width - width)
        profiler.add_prefill(run, grid.prefills[-1], width)
    pairs = [(width, measure(ping_pong(width, device.width), grid.full)) for width in grid.widths]
    runs += [run for _, run in pairs]
    max_mhz = max(run.mhz for run in runs)
    table = OpTable(
        device=device.name,
        width=device.width,
        width_step=device.width_step,
        idle_watts=device.idle_watts,
        cap_watts=_cap_watts(runs, max_mhz, device.limit_watts),
        max_mhz=max_mhz,
        products=tuple(
            Product(*shape, tuple(entries), shape in profiler.found.general)
            for shape, entries in profiler.found.products.items()
        ),
        decode=(),
        prefill=tuple(profiler.found.prefill),
        rows=tuple(profiler.found.rows),
        origin=origin,
        energy_exponent=_energy_exponent([run for _, run in pairs], device.idle_watts),
        row_granularity=device.row_granularity,
        kernels=device.kernels,
        steps=tuple(
            measured_step(spec, ping_pong(width, device.width), grid.full, run)
            for width, run in pairs
        ),
    )
    for mix, run in whole:
        profiler.add_decode(run, mix, device.width, profiler.watts_of_decode(table, mix, run))
    table = replace(table, decode=tuple(profiler.found.decode))
    return replace(table, slowdown=_slowdown(table, spec, grid.full, pairs))


def measured_step(spec: Spec, schedule: _core.Schedule, mix: StepMix, run: Run) -> MeasuredStep:
    load = asdict(load_of(mix))
    return MeasuredStep(shape_of(spec), schedule_to_json(schedule), load, run.us)


class _Profiler:
    """Sorts the ops of runs into the table's entries."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._bytes = 4 if spec.dtype == "float32" else 2
        self._heads = spec.num_heads * spec.head_dim
        self._qkv = self._heads + 2 * spec.num_kv_heads * spec.head_dim
        self.found = _Collected()

    def add_products(self, run: Run, mix: StepMix, width: int) -> None:
        """Those of a layer, and the work on rows between them."""
        spec, rows = self._spec, mix.decodes + mix.prefill_rows
        hidden, wide = spec.hidden_size, spec.intermediate_size
        for stage, op, features, depth in (
            ("qkv", "gemm", self._qkv, hidden),
            ("o", "gemm", hidden, self._heads),
            ("mlp", "gemm_silu_mul", 2 * wide, hidden),
            ("mlp", "gemm", hidden, wide),
        ):
            if (stage, 0, op) not in run.op_us:
                ops = ", ".join(sorted({name for at, _, name in run.op_us if at == stage}))
                raise ValueError(
                    f"stage {stage} of this model has no {op} but {ops}: only dense models can be "
                    "tuned"
                )
            shape = features, depth
            self._add_product(run, run.op_us[stage, 0, op], shape, rows, width)
            if op != "gemm" or spec.dtype != "bfloat16":
                self.found.general.add(shape)
        moved = 2 * rows * self._bytes * (2 * hidden + self._qkv)  # two norms and a rotation
        others = [
            us
            for (stage, _, op), us in run.op_us.items()
            if stage in STAGES_OF_PRODUCTS and not op.startswith("gemm")
        ]
        mean = (moved / len(others), sum(others) / len(others))
        self.found.rows.append(Entry(mean[0], width, mean[1], run.watts, run.mhz))

    def add_head(self, run: Run, mix: StepMix, width: int) -> None:
        shape = (self._spec.vocab_size, self._spec.hidden_size)
        self._add_product(run, run.op_us["head", 0, "gemm"], shape, mix.decodes, width)
        self.found.general.add(shape)  # logits are of float32

    def add_prefill(self, run: Run, mix: StepMix, width: int) -> None:
        flops = 4 * mix.prefill_rows * _prefill_keys(mix) * self._heads
        us = run.op_us["attn", 0, "attention"]
        self.found.prefill.append(Entry(flops, width, us, run.watts, run.mhz))

    def add_decode(self, run: Run, mix: StepMix, width: int, watts: float) -> None:
        read = 2 * mix.decodes * mix.context * self._spec.num_kv_heads * self._spec.head_dim
        us = run.op_us["attn", 0, "attention"]
        self.found.decode.append(Entry(read * self._bytes, width, us, watts, run.mhz))

    def watts_of_decode(self, table: OpTable, mix: StepMix, run: Run) -> float:
        """While attention runs on all of the device: what a step takes beyond all else in it."""
        model, load = CostModel(table, self._spec), load_of(mix)
        clock, layers = table.clock_of(run.mhz), self._spec.num_layers
        rest = sum(
            model.stage(stage, 1.0, table.width, load, clock).joules for stage in STAGES_OF_PRODUCTS
        )
        sequential = built_in_schedule("sequential", table.width)
        rest = rest * layers + model.head(sequential, load, clock).joules
        own = run.joules - table.idle_watts * run.us * 1e-6 - rest
        us = run.op_us["attn", 0, "attention"]
        return table.idle_watts + max(0.0, own) / layers / us * 1e6

    def _add_product(
        self, run: Run, us: float, shape: tuple[int, int], rows: int, width: int
    ) -> None:
        entry = Entry(rows, width, us, run.watts, run.mhz)
        self.found.products.setdefault(shape, []).append(entry)


def _cap_watts(runs: Sequence[Run], max_mhz: float, limit: float) -> float:
    """What the device takes at its limit, in the mean: a little less than that."""
    capped = [run.watts for run in runs if run.mhz < _THROTTLED * max_mhz]
    return min(limit, mean(capped)) if capped else limit


def _energy_exponent(runs: Sequence[Run], idle_watts: float) -> float:
    """Of the clock, in what the same work takes above idle."""
    points = [
        (log(run.mhz), log(run.joules - idle_watts * run.us * 1e-6))
        for run in runs
        if run.mhz > 0 and run.watts > idle_watts
    ]
    clocks = [clock for clock, _ in points]
    if not points or exp(max(clocks) - min(clocks)) * _THROTTLED < 1:
        return _EXPONENT
    slope, _ = linear_regression(clocks, [joules for _, joules in points])
    return min(MOST_EXPONENT, max(0.0, slope))


def _slowdown(
    table: OpTable, spec: Spec, mix: StepMix, pairs: Sequence[tuple[int, Run]]
) -> dict[tuple[str, str], float]:
    """Mean over pairs of widths: what ops take beside each other over what they take alone at the
    same clock. Below 1 where at a lower clock memory answers in fewer cycles than it did alone.

    All of a shorter attention is beside products, but only as much of them is beside it.
    """
    if not pairs:
        return {}
    model, load = CostModel(table, spec), load_of(mix)
    factors: dict[tuple[str, str], list[float]] = {
        ("memory", "compute"): [],
        ("compute", "memory"): [],
    }
    for width, run in pairs:
        schedule = ping_pong(width, table.width)
        alone, beside = {"attn": 0.0, "rest": 0.0}, {"attn": 0.0, "rest": 0.0}
        costs = model.costs(schedule, load, table.clock_of(run.mhz))
        for part, cost in zip(parts_of(schedule), costs, strict=True):
            kind = "attn" if part.stage == "attn" else "rest"
            alone[kind] += cost.us
            beside[kind] += sum(
                us
                for (stage, number, _), us in run.op_us.items()
                if (stage, number) == (part.stage, part.number)
            )
        factors["memory", "compute"].append(beside["attn"] / alone["attn"])
        shared = min(beside["attn"], beside["rest"])
        lost = min(beside["rest"] - alone["rest"], 0.8 * shared)
        factors["compute", "memory"].append(shared / (shared - lost))
    return {pair: mean(found) for pair, found in factors.items()}
