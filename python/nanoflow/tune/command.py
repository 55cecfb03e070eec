"""The command `nanoflow tune`: measure a device, search schedules, and measure the best ones."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from nanoflow import _core
from nanoflow.arguments import add_engine_arguments
from nanoflow.bench import environment
from nanoflow.bench.default_model import llm_arguments
from nanoflow.bench.telemetry import Telemetry
from nanoflow.config import EngineArgs
from nanoflow.devices import make_backends
from nanoflow.loading import open_checkpoint
from nanoflow.mixed_step import PAGE_SIZE, StepMix, capacities, deal_step
from nanoflow.schedule import built_in_schedule, schedule_to_json
from nanoflow.tune.calibrate import calibrated
from nanoflow.tune.costs import CostModel
from nanoflow.tune.measure import Run, Runner
from nanoflow.tune.profile import Device, Grid, load_of, measured_step, profile
from nanoflow.tune.results import device_name, key_of, save_result
from nanoflow.tune.search import Candidate, memory_widths, search
from nanoflow.tune.table import OpTable, save_table, table_to_json

ENGINE_FLAGS = (
    "model",
    "dtype",
    "load_format",
    "revision",
    "seed",
    "device",
    "cpu_threads",
    "cpu_isa",
)
CACHE_SHARE = 0.8  # of the free memory, for keys and values
IDLE_SECONDS = 2.0
MOST_CUTS = 15  # of a schedule


@dataclass(frozen=True, slots=True)
class _Defaults:
    rows: tuple[int, ...]
    decodes: tuple[int, ...]
    context: int
    seconds: float
    width_step: int
    most_widths: int  # those of an eighth to a third of the device, evenly


DEFAULTS = {
    "cuda": _Defaults((256, 512, 768, 1024, 1536, 2048), (256, 512), 768, 4.0, 8, 8),
    "cpu": _Defaults((8, 16, 32), (8, 16), 64, 0.4, 1, 3),
}


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_tune)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", help="rows of prompts in the steps that are measured")
    add("--decodes", type=int, nargs="+", help="requests that decode in such steps")
    add("--context", type=int, help="keys that each of them reads")
    add("--widths", type=int, nargs="+", help="of the lane of attention: SMs, or threads of a CPU")
    add("--seconds", type=float, help="of every run, its first half dropped")
    add("--candidates", type=int, default=6, help="schedules run for real (default: 6)")
    add("--output", type=Path, metavar="FILE", help="also write the fastest one, for --schedule")
    add("--table", type=Path, metavar="FILE", help="also write the op times, as in the package")
    add_engine_arguments(parser, ENGINE_FLAGS)


def run_tune(options: argparse.Namespace) -> None:
    """Raises ValueError on sizes that the model or the device do not have."""
    arguments = llm_arguments(options)
    args = EngineArgs(**arguments)
    checkpoint = open_checkpoint(
        args.model, args.load_format, revision=args.revision, seed=args.seed
    )
    spec = _core.ModelSpec(**checkpoint.model.spec_arguments(checkpoint.resolve_dtype(args.dtype)))
    backend = make_backends(args, spec)[0]
    weights = _core.Weights(spec, backend)
    checkpoint.load_weights(weights)
    weights.finish()
    grid = make_grid(options, backend, spec, checkpoint.model.max_position_embeddings)
    with Telemetry(backend.device) as telemetry:
        if telemetry.reason is not None and backend.device != "cpu":
            print(f"power is left out of the account: {telemetry.reason}")
        sequential = built_in_schedule("sequential", backend.width)
        engine = _core.Engine(_capacities(grid), weights, sequential)
        default = DEFAULTS[backend.device.partition(":")[0]]
        runner = Runner(engine, spec.vocab_size, telemetry, options.seconds or default.seconds)
        runner.fill()
        tuned = _tune(options, runner, telemetry, backend, spec, grid)
    _report(tuned, grid)
    key = key_of(backend, spec)
    path = key.path("tuned")
    content = {
        "command": environment.command_line(),
        "table": table_to_json(tuned.table),
        "measured": [result.to_json(grid) for result in tuned.results],
    }
    save_result(path, key, content)
    print(f"{path}: schedule='auto' uses it from now on")
    if options.output is not None:
        best = schedule_to_json(tuned.results[0].candidate.schedule)
        options.output.write_text(json.dumps(best, indent=1) + "\n", encoding="utf-8")
        print(f"{options.output}: schedule {best['id']}")
    if options.table is not None:
        save_table(tuned.table, options.table)
        print(f"{options.table}: op times")


@dataclass(frozen=True, slots=True)
class Result:
    """A schedule that was searched, and run."""

    candidate: Candidate
    run: Run

    def tokens_per_second(self, grid: Grid) -> float:
        return load_of(grid.full).rows / self.run.us * 1e6

    def to_json(self, grid: Grid) -> dict[str, Any]:
        return {
            "schedule": schedule_to_json(self.candidate.schedule),
            "load": asdict(load_of(grid.full)),
            "predicted_step_us": self.candidate.prediction.step_us,
            "step_us": self.run.us,
            "tokens_per_second": self.tokens_per_second(grid),
            "watts": self.run.watts,
            "sm_mhz": self.run.mhz,
        }


@dataclass(frozen=True, slots=True)
class Tuned:
    table: OpTable
    results: list[Result]  # the fastest first


def make_grid(
    options: argparse.Namespace, backend: _core.Backend, spec: _core.ModelSpec, positions: int
) -> Grid:
    """What the options say, else what suits the kind of device and fits its memory."""
    default = DEFAULTS[backend.device.partition(":")[0]]
    context = min(options.context or default.context, positions)
    pages = int(CACHE_SHARE * backend.free_memory) // (spec.kv_bytes_per_token * PAGE_SIZE)
    fitting = pages // -(-context // PAGE_SIZE)
    decodes = options.decodes or [min(count, fitting) for count in default.decodes]
    widths = options.widths or default_widths(backend.width, default)
    grid = Grid(
        rows=sorted(set(options.rows or default.rows)),
        decodes=sorted(set(decodes)),
        context=context,
        widths=sorted(set(widths)),
    )
    if grid.rows[0] < 1 or grid.decodes[0] < 1:
        raise ValueError(f"rows {grid.rows} and decodes {grid.decodes} must be at least 1")
    for width in grid.widths:
        if not 1 <= width < backend.width:
            raise ValueError(f"--widths {width} must be below the device's {backend.width}")
    grid.full.check(positions)
    return grid


def default_widths(width: int, default: _Defaults) -> list[int]:
    possible = memory_widths(width, default.width_step)
    likely = [one for one in possible if width <= 8 * one and 3 * one <= width] or possible
    count = min(len(likely), default.most_widths)
    return [likely[i * len(likely) // count] for i in range(count)]


def _capacities(grid: Grid) -> _core.EngineConfig:
    """For any schedule, wherever it cuts."""
    mixes = [*grid.prefills, *grid.decode_steps, grid.full]
    return capacities([deal_step(mix, []) for mix in mixes], MOST_CUTS)


def _tune(
    options: argparse.Namespace,
    runner: Runner,
    telemetry: Telemetry,
    backend: _core.Backend,
    spec: _core.ModelSpec,
    grid: Grid,
) -> Tuned:
    with tqdm(total=grid.runs + options.candidates, desc="measuring", unit="run") as bar:

        def measure(schedule: _core.Schedule, mix: StepMix) -> Run:
            bar.set_postfix_str(f"{schedule.id}, {mix.decodes} + {mix.prefill_rows} rows")
            run = runner.run(schedule, mix)
            bar.update()
            return run

        kind = backend.device.partition(":")[0]
        device = Device(
            device_name(backend),
            backend.width,
            DEFAULTS[kind].width_step,
            _idle_watts(telemetry),
            float(telemetry.board.get("power_limit_watts", 0.0)),
            backend.row_granularity,
            kernels="cuda" if kind == "cuda" else "",
        )
        found = profile(measure, spec, device, grid, _origin(telemetry))
        table = calibrated(found, spec)
        if options.table is not None:
            save_table(table, options.table)  # should what follows fail
        candidates = search(CostModel(table, spec), load_of(grid.full), options.candidates)
        results = [Result(one, measure(one.schedule, grid.full)) for one in candidates]
    results.sort(key=lambda result: result.run.us)
    steps = tuple(measured_step(spec, r.candidate.schedule, grid.full, r.run) for r in results)
    return Tuned(calibrated(replace(found, steps=found.steps + steps), spec), results)


def _origin(telemetry: Telemetry) -> dict[str, str]:
    origin = {"command": environment.command_line()}
    if "driver" in telemetry.board:
        origin["driver"] = str(telemetry.board["driver"])
    commit = environment.commit()
    return origin if commit is None else {**origin, "commit": commit}


def _idle_watts(telemetry: Telemetry) -> float:
    """Of the device with its memory in use and nothing running."""
    if telemetry.reason is not None:
        return 0.0
    begin = time.perf_counter()
    time.sleep(IDLE_SECONDS)
    power = telemetry.power(begin + IDLE_SECONDS / 2, time.perf_counter())
    return power.watts if power else 0.0


def _report(tuned: Tuned, grid: Grid) -> None:
    full = grid.full
    print(
        f"{full.decodes} requests decode, {full.context} tokens each, "
        f"{full.prefill_rows} rows prefill"
    )
    print(f"{'schedule':28}{'tokens/s':>10}{'step ms':>9}{'predicted':>11}{'W':>6}{'MHz':>6}")
    for result in tuned.results:
        run, predicted = result.run, result.candidate.prediction.step_us
        print(
            f"{result.candidate.schedule.id:28}{result.tokens_per_second(grid):10.0f}"
            f"{run.us / 1e3:9.2f}{predicted / 1e3:11.2f}{run.watts:6.0f}{run.mhz:6.0f}"
        )
