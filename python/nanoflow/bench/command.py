"""Flags and commands of `python -m nanoflow.bench` (also `nanoflow bench`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoflow._core import Schedule
from nanoflow.arguments import add_engine_arguments
from nanoflow.bench.ablation import ablation_schedules, compare, draw_ablations, find_schedules
from nanoflow.bench.ablation import table as ablation_table
from nanoflow.bench.ceiling import gemm_ceiling_tflops
from nanoflow.bench.default_model import llm_arguments
from nanoflow.bench.first_run import first_run
from nanoflow.bench.latency import add_latency_arguments
from nanoflow.bench.result import result_path, write
from nanoflow.bench.serve import add_serve_arguments
from nanoflow.bench.startup import add_startup_arguments
from nanoflow.bench.throughput_run import measure_workload
from nanoflow.bench.workload import (
    NUM_PROMPTS,
    Workload,
    add_workload_arguments,
    make_workload,
)
from nanoflow.errors import EngineError
from nanoflow.ordering import ORDERS
from nanoflow.progress import logs_beside_bar

STEADY_SECONDS = 20.0
NUM_PROMPTS_STEADY = 4000  # what is left of them at the window's end is dropped


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model and the subcommands; without a subcommand the first run is chosen."""
    parser.set_defaults(run=run_first_run)
    parser.epilog = "Without a command: answers to three prompts, and what three schedules reach."
    add_engine_arguments(parser, ["model"])
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, add_arguments, what in (
        ("throughput", add_throughput_arguments, "a workload given at once"),
        ("latency", add_latency_arguments, "one batch at a time"),
        ("serve", add_serve_arguments, "requests that arrive one by one"),
        ("startup", add_startup_arguments, "processes that start"),
    ):
        text = f"{what}, with the flags of `vllm bench {name}`"
        add_arguments(commands.add_parser(name, help=text, description=text))


def add_throughput_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_throughput)
    add_workload_arguments(parser)
    add = parser.add_argument
    add("--temperature", type=float, default=1.0, help="(default: 1.0)")
    add("--n", type=int, default=1, help="outputs of each prompt (default: 1)")
    add("--order", choices=ORDERS, default="fcfs", help="in which requests begin (default: fcfs)")
    add("--async-engine", action="store_true", help="run AsyncLLM, with a task for each request")
    add(
        "--prequeue-requests",
        action="store_true",
        help="queue all requests before the first step: as always, but with --async-engine, where "
        "they come while it runs",
    )
    add("--disable-detokenize", action="store_true", help="leave out making text of the output")
    add(
        "--steady-start",
        action="store_true",
        help="fill the batch with requests of evenly spread progress, measure the steady state "
        f"that follows, and end (--num-prompts is then {NUM_PROMPTS_STEADY} by default)",
    )
    add("--steady-seconds", type=float, default=STEADY_SECONDS, help=f"(default: {STEADY_SECONDS})")
    add(
        "--profile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU: time the longest matrix product alone and, after --steady-start, all "
        "kernels of some steps (needs torch)",
    )
    add(
        "--ablate",
        action="store_true",
        help="run sequential, the schedule's nano-batches without overlap, and the schedule "
        "(default: overlap), and compare",
    )
    add(
        "--compare",
        nargs="+",
        metavar="SCHEDULE",
        help="run these schedules, names or files, and compare them with the first; that may be "
        "auto",
    )
    add("--plot", type=Path, metavar="PNG", help="draw what --ablate or --compare finds")
    add(
        "--simulate-tensor-parallel",
        dest="simulated_tensor_parallel_size",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="run one rank of N without the others: its collectives copy its own data instead, at "
        "the speed of its memory, and what is generated makes no sense",
    )
    add("--output-json", type=Path, metavar="FILE", help="write the result")
    add("--result-dir", type=Path, metavar="DIR", help="write it to DIR/GPU/WORKLOAD-SCHEDULE.json")
    add("--commit", help="what the result says was measured (default: as git says)")
    add_engine_arguments(parser)


def run_first_run(options: argparse.Namespace) -> None:
    first_run(llm_arguments(options)["model"])


def run_throughput(options: argparse.Namespace) -> None:
    """Raises ValueError on flags that do not fit together, or a workload that does not fit."""
    count = NUM_PROMPTS_STEADY if options.steady_start else NUM_PROMPTS
    workload = make_workload(options, count)
    if options.n < 1 or (options.n > 1 and options.steady_start):
        raise ValueError(f"--n {options.n} must be at least 1, and is 1 with --steady-start")
    if not options.steady_seconds > 0:
        raise ValueError(f"--steady-seconds {options.steady_seconds} must be above 0")
    _check_front(options)
    if options.ablate and options.compare:
        raise ValueError("--ablate and --compare both say which schedules to run: give one of them")
    if options.plot is not None and not (options.ablate or options.compare):
        raise ValueError("--plot draws what --ablate or --compare finds: add one of them")
    arguments = llm_arguments(options)

    schedules: Sequence[Schedule | str] = []
    if options.ablate:
        schedules = ablation_schedules(arguments)
    elif options.compare:
        schedules = find_schedules(options.compare, arguments)
    with logs_beside_bar(is_shown=True):
        results = _run(options, workload, arguments, schedules)
    if options.result_dir is not None:
        for one in results:
            write(result_path(options.result_dir, one), one)
    found = results[0]
    if schedules:
        found = compare(results)
        print(ablation_table(found))
        if options.plot is not None:
            draw_ablations([found], options.plot)
    if options.output_json is not None:
        write(options.output_json, found)


def _check_front(options: argparse.Namespace) -> None:
    """Raises ValueError on what AsyncLLM, which takes requests one by one, cannot do."""
    asked = {
        "--prequeue-requests": options.prequeue_requests,
        "--order auto": options.order != "fcfs",
        "--steady-start": options.steady_start,
        "--ablate": options.ablate,
        "--compare": options.compare,
    }
    refused = [flag for flag, is_on in asked.items() if is_on]
    if options.async_engine and refused:
        raise ValueError(f"--async-engine has no {', '.join(refused)}: that takes an LLM")


def _run(
    options: argparse.Namespace,
    workload: Workload,
    arguments: dict[str, Any],
    schedules: Sequence[Schedule | str],
) -> list[dict[str, Any]]:
    """Measures and prints."""
    results = []
    ceiling: dict[str, Any] | None = None
    for found, text in measure_workload(options, workload, arguments, schedules):
        if options.profile and found["gpu"] is not None:
            ceiling = ceiling or _ceiling(found["memory"]["device"])
            found |= ceiling
        if schedules:
            print(f"Schedule: {found['schedule']}")
        print("\n".join(text))
        print(f"Warm-up: {found['warm_up']}")
        phases = found["phase_seconds"].items()
        print("Phases: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases))
        _print_gpu(found)
        results.append(found)
    return results


def _ceiling(device: str) -> dict[str, Any]:
    try:
        return {"gemm_ceiling_tflops": gemm_ceiling_tflops(device)}
    except EngineError as error:  # not enough memory, say: what was measured still counts
        return {"gemm_ceiling_reason": str(error)}


def _print_gpu(found: dict[str, Any]) -> None:
    if found["gpu"] is None:
        return
    if found["watts"] is not None:
        print(
            f"GPUs: {found['boards']}, {found['watts']:.0f} W, {found['sm_mhz']:.0f} MHz, "
            f"{found['j_per_token'] * 1e3:.2f} mJ/token"
        )
    if found["gemm_ceiling_tflops"] is not None:
        print(f"Matrix product alone: {found['gemm_ceiling_tflops']:.0f} TFLOP/s")
    if found["profile"] is None:
        print(f"No profile: {found['profile_reason']}")
        return
    profile = found["profile"]
    print(
        f"Profiled step: {profile['step_ms']:.2f} ms, kernels {profile['kernel_sum_ms']:.2f} ms, "
        f"GPU idle {profile['gpu_idle_pct']:.2f} % (unprofiled step {found['step_ms']:.2f} ms)"
    )
    for kernel in profile["kernels"]:
        print(
            f"{kernel['us_per_step']:9.1f} us/step {kernel['runs_per_step']:6.1f} x "
            f"{kernel['mean_us']:8.1f} us  {kernel['name'][:70]}  after {str(kernel['after'])[:40]}"
        )
