"""Flags and commands of `python -m nanoflow.bench` (also `nanoflow bench`)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np

from nanoflow.arguments import add_engine_arguments, engine_arguments
from nanoflow.bench import environment
from nanoflow.bench.datasets import (
    Lengths,
    Request,
    random_lengths,
    random_requests,
    read_trace,
    sample_trace,
)
from nanoflow.bench.default_model import default_model
from nanoflow.bench.first_run import first_run
from nanoflow.bench.throughput import Measurement, lines, measure, to_json
from nanoflow.llm import LLM

# (count, most tokens of a request, random numbers) -> lengths
LengthSource: TypeAlias = Callable[[int, int, np.random.Generator], list[Lengths]]

RANDOM_FLAGS = (
    "input_len",
    "output_len",
    "random_input_len",
    "random_output_len",
    "random_range_ratio",
)
DEFAULT_MODEL_ID = "SmolLM2-135M-Instruct"


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model and the subcommands; without a subcommand the first run is chosen."""
    parser.set_defaults(run=run_first_run)
    add_engine_arguments(parser, ["model"])
    commands = parser.add_subparsers(title="commands", metavar="")
    _add_throughput(commands)


def _add_throughput(commands: Any) -> None:
    parser = commands.add_parser("throughput", help="a workload given at once, with vLLM's flags")
    parser.set_defaults(run=run_throughput)
    add = parser.add_argument
    add("--dataset-name", choices=("random", "trace"), default="random")
    add("--dataset-path", type=Path, help="CSV of input and output lengths, for trace")
    add("--input-len", type=int, help="as --random-input-len")
    add("--output-len", type=int, help="as --random-output-len")
    add("--random-input-len", type=int, help="mean prompt tokens (default: 1024)")
    add("--random-output-len", type=int, help="mean output tokens (default: 128)")
    add(
        "--random-range-ratio",
        type=float,
        help="lengths are uniform in [L * (1 - r), L * (1 + r)] (default: 0.0)",
    )
    add("--num-prompts", type=int, default=1000, help="(default: 1000)")
    add("--num-warmups", type=int, default=0, help="requests run before, uncounted (default: 0)")
    add("--temperature", type=float, default=1.0, help="(default: 1.0)")
    add("--disable-detokenize", action="store_true", help="leave out making text of the output")
    add("--output-json", type=Path, metavar="FILE", help="write the result")
    add_engine_arguments(parser)


def run_first_run(options: argparse.Namespace) -> None:
    first_run(getattr(options, "model", None) or default_model())


def run_throughput(options: argparse.Namespace) -> None:
    """Raises ValueError on flags that do not fit together, or a workload that does not fit."""
    draw_lengths = _workload(options)
    arguments = {"model": default_model()} if not hasattr(options, "model") else {}
    arguments |= engine_arguments(options)
    seed = getattr(options, "seed", 0)
    rng, warm_up_rng = np.random.default_rng(seed).spawn(2)
    begin = perf_counter()
    with LLM(**arguments) as llm:
        phases = {"load": perf_counter() - begin}
        special_ids = () if llm.args.skip_tokenizer_init else llm.get_tokenizer().special_ids
        max_total = llm.limits.max_model_len

        def requests(count: int, rng: np.random.Generator) -> list[Request]:
            lengths = draw_lengths(count, max_total, rng)
            return random_requests(lengths, llm.vocab_size, special_ids, rng)

        def run(requests: list[Request]) -> Measurement:
            return measure(
                llm,
                requests,
                temperature=options.temperature,
                detokenize=not options.disable_detokenize,
                seed=seed,
            )

        workload = requests(options.num_prompts, rng)
        if options.num_warmups > 0:
            phases["warm_up"] = run(requests(options.num_warmups, warm_up_rng)).seconds
        measured = run(workload)
        phases["run"] = measured.seconds
        result = to_json(measured) | _circumstances(options, llm, phases)
    print("\n".join(lines(measured)))
    print(f"Warm-up: {result['warm_up']}")
    print("Phases: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items()))
    if options.output_json is not None:
        options.output_json.write_text(json.dumps(result, indent=2) + "\n")


def _workload(options: argparse.Namespace) -> LengthSource:
    """Reads the trace, or checks the flags of random lengths."""
    if options.num_prompts < 1 or options.num_warmups < 0:
        raise ValueError(
            f"--num-prompts {options.num_prompts} must be at least 1, "
            f"--num-warmups {options.num_warmups} at least 0"
        )
    for_random = [name for name in RANDOM_FLAGS if getattr(options, name) is not None]
    if options.dataset_name == "trace":
        if options.dataset_path is None:
            raise ValueError("--dataset-name trace needs --dataset-path FILE")
        if for_random:
            raise ValueError(f"--{for_random[0].replace('_', '-')} is for --dataset-name random")
        trace = read_trace(options.dataset_path)
        return lambda count, max_total, rng: sample_trace(trace, count, max_total, rng)
    if options.dataset_path is not None:
        raise ValueError("--dataset-path is for --dataset-name trace")
    for side in ("input_len", "output_len"):
        if side in for_random and f"random_{side}" in for_random:
            flag = side.replace("_", "-")
            raise ValueError(f"--{flag} and --random-{flag} are the same: give one of them")
    given = {name: getattr(options, name) for name in for_random}
    mean_input = given.get("input_len", given.get("random_input_len", 1024))
    mean_output = given.get("output_len", given.get("random_output_len", 128))
    ratio = given.get("random_range_ratio", 0.0)

    def draw(count: int, max_total: int, rng: np.random.Generator) -> list[Lengths]:
        lengths = random_lengths(mean_input, mean_output, ratio, count, rng)
        longest = max((one.input + one.output for one in lengths), default=0)
        if longest > max_total:
            raise ValueError(
                f"requests of up to {longest} tokens exceed max_model_len {max_total}: lower "
                "--random-input-len or --random-output-len, or raise --max-model-len"
            )
        return lengths

    return draw


def _circumstances(
    options: argparse.Namespace, llm: LLM, phases: dict[str, float]
) -> dict[str, Any]:
    """What a result must say beside its figures."""
    schedule = llm.args.schedule
    return {
        "model_id": str(getattr(options, "model", DEFAULT_MODEL_ID)),
        "dataset": options.dataset_name,
        "seed": llm.args.seed,
        "schedule": str(schedule),
        "temperature": options.temperature,
        "detokenize": not options.disable_detokenize,
        "warm_up": (
            f"{options.num_warmups} requests of the same kind, not counted"
            if options.num_warmups
            else "none; loading is not counted"
        ),
        "phase_seconds": phases,
        "limits": asdict(llm.limits),
        "device": f"{llm.device_description}; {environment.cpu_model()}",
        "versions": environment.versions(),
        "command": environment.command_line(),
    }
