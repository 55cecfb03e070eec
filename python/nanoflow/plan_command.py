"""The command `nanoflow plan`: a schedule's plan in words and as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from nanoflow import _core, plan_view
from nanoflow.arguments import add_engine_arguments, engine_arguments
from nanoflow.bench.default_model import default_model
from nanoflow.config import EngineArgs
from nanoflow.loading import open_checkpoint
from nanoflow.runtime import make_backend
from nanoflow.schedule import find_schedule

ENGINE_FLAGS = (
    "model",
    "dtype",
    "load_format",
    "revision",
    "seed",
    "device",
    "cpu_threads",
    "cpu_isa",
    "schedule",
)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_plan)
    add = parser.add_argument
    add("--rows", type=int, default=64, help="requests that decode in the step (default: 64)")
    add("--context", type=int, help="tokens each of them reads (default: 512, or all it can)")
    add("--layer", type=int, help="the layer to show (default: the middle one)")
    add("--png", type=Path, metavar="FILE", help="run the step and draw its lanes over the layer")
    add_engine_arguments(parser, ENGINE_FLAGS)


def run_plan(options: argparse.Namespace) -> None:
    """Raises ValueError on a layer or sizes that the model does not have."""
    arguments = engine_arguments(options)
    if "model" not in arguments:
        arguments["model"] = default_model()
    args = EngineArgs(**arguments)
    checkpoint = open_checkpoint(
        args.model, args.load_format, revision=args.revision, seed=args.seed
    )
    model = checkpoint.model
    positions = model.max_position_embeddings
    rows, layer, context = options.rows, options.layer, options.context
    layer = model.num_layers // 2 if layer is None else layer
    context = min(512, positions) if context is None else context
    if not 0 <= layer < model.num_layers:
        raise ValueError(f"--layer {layer}: the model has layers 0 to {model.num_layers - 1}")
    if rows < 1:
        raise ValueError(f"--rows {rows} must be at least 1")
    if not 1 <= context <= positions:
        raise ValueError(f"--context {context} must be from 1 to the model's {positions} positions")
    backend = make_backend(args)
    spec = _core.ModelSpec(**model.spec_arguments(checkpoint.resolve_dtype(args.dtype)))
    weights = _core.Weights(spec, backend)
    checkpoint.load_weights(weights)
    schedule = find_schedule(args.schedule, backend.width)
    engine = _core.Engine(plan_view.engine_config(rows, context), weights, schedule)
    segments = plan_view.segment_rows(schedule, rows)
    plan = engine.plan(segments, rows)
    print(plan_view.plan_of_layer(plan, layer))
    for finding in plan.validate(backend.width):
        print(f"finding: {finding}")
    if options.png is None:
        return
    timings = plan_view.measure_step(engine, segments, context)
    title = (
        f"{schedule.id}: layer {layer} of {Path(args.model).name}, {rows} requests decode, "
        f"{context} tokens each, on {backend.description}"
    )
    plan_view.draw_lanes(timings, [lane.name for lane in schedule.lanes], layer, title, options.png)
    print(f"{options.png}: lanes over layer {layer}, measured")
