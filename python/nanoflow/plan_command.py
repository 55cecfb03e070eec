"""The command `nanoflow plan`: a schedule's plan in words, as a picture and as a timeline."""

from __future__ import annotations

import argparse
from pathlib import Path

from nanoflow import _core, plan_view
from nanoflow.arguments import add_engine_arguments
from nanoflow.bench.default_model import llm_arguments
from nanoflow.bench.telemetry import Telemetry
from nanoflow.config import EngineArgs
from nanoflow.devices import make_backends
from nanoflow.loading import RankStores, open_checkpoint
from nanoflow.mixed_step import MixedStep, StepMix, deal_step, run_steps
from nanoflow.plan_page import PlanPage, predicted_panel
from nanoflow.runtime import make_spec
from nanoflow.schedule import schedule_to_json
from nanoflow.trace import TimedStep, trace_of, write_trace
from nanoflow.tune.auto import choose_schedules, known_table
from nanoflow.tune.costs import CostModel
from nanoflow.tune.measure import Run, Runner

SECONDS = 1.0  # of steps whose rate is shown
ENGINE_FLAGS = (
    "model",
    "dtype",
    "load_format",
    "revision",
    "seed",
    "device",
    "cpu_threads",
    "cpu_isa",
    "tensor_parallel_size",
    "schedule",
)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_plan)
    add = parser.add_argument
    add("--rows", type=int, default=64, help="requests that decode in the step (default: 64)")
    add("--context", type=int, help="tokens each of them reads (default: 512, or all it can)")
    add("--prefill-rows", type=int, default=0, help="rows of prompts in the step (default: 0)")
    add("--layer", type=int, help="the layer to show (default: the middle one)")
    add("--png", type=Path, metavar="FILE", help="run the step and draw its lanes over the layer")
    add("--html", type=Path, metavar="FILE", help="the same as a page, with lanes, rows and rates")
    add("--trace", type=Path, metavar="FILE", help="run the step and write a Perfetto timeline")
    add("--steps", type=int, default=3, help="steps of the timeline (default: 3)")
    add_engine_arguments(parser, ENGINE_FLAGS)


def run_plan(options: argparse.Namespace) -> None:
    """Raises ValueError on a layer or sizes that the model does not have."""
    arguments = llm_arguments(options)
    args = EngineArgs(**arguments)
    checkpoint = open_checkpoint(
        args.model, args.load_format, revision=args.revision, seed=args.seed
    )
    model = checkpoint.model
    mix = _step_mix(options, model.max_position_embeddings)
    layer = model.num_layers // 2 if options.layer is None else options.layer
    if not 0 <= layer < model.num_layers:
        raise ValueError(f"--layer {layer}: the model has layers 0 to {model.num_layers - 1}")
    backends = make_backends(args)
    backend = backends[0]
    spec = make_spec(args, checkpoint)
    schedule = choose_schedules(args, backend, spec).schedules[0]
    step = deal_step(mix, schedule.cuts())
    weights = [_core.Weights(spec, one, schedule.gathers) for one in backends]
    checkpoint.load_weights(RankStores(weights))
    engine = _core.Engine(step.engine_config(), weights, schedule)
    layers, head = engine.plans(step.segment_rows, len(step.rows))
    print(plan_view.plan_of_layer(layers, layer))
    print(head)
    for finding in layers.validate(backend.width) + head.validate(backend.width):
        print(f"finding: {finding}")
    if options.png is None and options.html is None and options.trace is None:
        return
    results = run_steps(engine, step.batch(spec.vocab_size), options.steps)
    name = Path(args.model).name
    if options.png is not None or options.html is not None:
        panels, prediction = [plan_view.Panel("measured", results[-1].timings)], None
        table = known_table(backend, spec)
        if table is not None:
            panel, prediction = predicted_panel(CostModel(table, spec), schedule, mix, layer)
            panels.insert(0, panel)
        page = PlanPage(
            title=f"{schedule.id}: layer {layer} of {name}, {_words(mix)}, {backend.description}",
            schedule=schedule,
            width=backend.width,
            unit="threads" if backend.device == "cpu" else "SMs",
            segment_rows=step.segment_rows,
            mix=mix,
            layer=layer,
            panels=panels,
            run=_sustained(engine, backend, spec, schedule, mix),
            prediction=prediction,
        )
        _draw(page, options.png, options.html)
    if options.trace is not None:
        facts = {"model": name, "dtype": spec.dtype, "device": backend.description}
        _write_trace(options.trace, results, schedule, {**facts, **_sizes(mix, step)})
        print(f"{options.trace}: {len(results)} steps, measured; open it at ui.perfetto.dev")


def _sustained(
    engine: _core.Engine,
    backend: _core.Backend,
    spec: _core.ModelSpec,
    schedule: _core.Schedule,
    mix: StepMix,
) -> Run:
    with Telemetry(backend.device) as telemetry:
        return Runner(engine, spec.vocab_size, telemetry, SECONDS).run(schedule, mix)


def _draw(page: PlanPage, png: Path | None, html: Path | None) -> None:
    shown = "measured" if page.prediction is None else "predicted and measured"
    for path, write in ((png, page.write_png), (html, page.write_html)):
        if path is not None:
            write(path)
            print(f"{path}: lanes over layer {page.layer}, {shown}")


def _step_mix(options: argparse.Namespace, positions: int) -> StepMix:
    """Raises ValueError on sizes that a model of so many positions does not have."""
    context = min(512, positions) if options.context is None else options.context
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps} must be at least 1")
    mix = StepMix(options.rows, context, options.prefill_rows)
    mix.check(positions)
    return mix


def _write_trace(
    path: Path,
    results: list[_core.StepResult],
    schedule: _core.Schedule,
    facts: dict[str, object],
) -> None:
    steps = [TimedStep(result.begin_us, result.timings) for result in results]
    lanes = [lane.name for lane in schedule.lanes]
    metadata = {**facts, "schedule": schedule_to_json(schedule)}
    write_trace(trace_of(steps, lanes, metadata), path)


def _sizes(mix: StepMix, step: MixedStep) -> dict[str, object]:
    return {
        "decodes": mix.decodes,
        "context": mix.context,
        "prefill_rows": mix.prefill_rows,
        "segment_rows": step.segment_rows,
    }


def _words(mix: StepMix) -> str:
    words = f"{mix.decodes} requests decode, {mix.context} tokens each"
    return words + (f", {mix.prefill_rows} rows prefill" if mix.prefill_rows else "")
