"""Which requests a throughput run gives: vLLM's flags, checked, and a name for the results."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from nanoflow.bench.datasets import Lengths, random_lengths, read_trace, sample_trace

# (count, most tokens of a request, random numbers) -> lengths
LengthSource: TypeAlias = Callable[[int, int, np.random.Generator], list[Lengths]]

RANDOM_FLAGS = (
    "input_len",
    "output_len",
    "random_input_len",
    "random_output_len",
    "random_range_ratio",
)
NUM_PROMPTS = 1000
NUM_PROMPTS_STEADY = 4000  # what is left of them at the window's end is dropped


@dataclass(frozen=True, slots=True)
class Workload:
    name: str  # "512x512", or the trace's
    num_prompts: int
    draw: LengthSource


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
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
    add(
        "--num-prompts",
        type=int,
        help=f"(default: {NUM_PROMPTS}, with --steady-start {NUM_PROMPTS_STEADY})",
    )
    add("--num-warmups", type=int, default=0, help="requests run before, uncounted (default: 0)")


def make_workload(options: argparse.Namespace) -> Workload:
    """Reads the trace, or checks the flags of random lengths. Raises ValueError."""
    num_prompts = options.num_prompts
    if num_prompts is None:
        num_prompts = NUM_PROMPTS_STEADY if options.steady_start else NUM_PROMPTS
    if num_prompts < 1 or options.num_warmups < 0:
        raise ValueError(
            f"--num-prompts {num_prompts} must be at least 1, "
            f"--num-warmups {options.num_warmups} at least 0"
        )
    for_random = [name for name in RANDOM_FLAGS if getattr(options, name) is not None]
    if options.dataset_name == "trace":
        if options.dataset_path is None:
            raise ValueError("--dataset-name trace needs --dataset-path FILE")
        if for_random:
            raise ValueError(f"--{for_random[0].replace('_', '-')} is for --dataset-name random")
        trace = read_trace(options.dataset_path)
        return Workload(
            options.dataset_path.stem,
            num_prompts,
            lambda count, max_total, rng: sample_trace(trace, count, max_total, rng),
        )
    if options.dataset_path is not None:
        raise ValueError("--dataset-path is for --dataset-name trace")
    for side in ("input_len", "output_len"):
        if side in for_random and f"random_{side}" in for_random:
            flag = side.replace("_", "-")
            raise ValueError(f"--{flag} and --random-{flag} are the same: give one of them")
    return _random_workload({name: getattr(options, name) for name in for_random}, num_prompts)


def _random_workload(given: dict[str, float], num_prompts: int) -> Workload:
    mean_input = int(given.get("input_len", given.get("random_input_len", 1024)))
    mean_output = int(given.get("output_len", given.get("random_output_len", 128)))
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

    name = f"{mean_input}x{mean_output}" + (f"-r{ratio:g}" if ratio else "")
    return Workload(name, num_prompts, draw)
