"""Which requests a benchmark gives: vLLM's flags, checked, and a name for the results."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from nanoflow.bench.datasets import (
    Lengths,
    Request,
    random_lengths,
    random_requests,
    read_trace,
    sample_trace,
)
from nanoflow.bench.published import PUBLISHED, passes_filter, published_lengths
from nanoflow.bench.sharegpt import read_conversations, sample_conversations
from nanoflow.tokenizer import Tokenizer

NUM_PROMPTS = 1000
DATASETS = ("random", "sharegpt", "trace", "prefix_repetition", *PUBLISHED)
# Flags of prefix_repetition, and what they are where they are not given: vLLM's.
PREFIX_REPETITION: Mapping[str, int] = MappingProxyType(
    {
        "prefix_repetition_prefix_len": 256,
        "prefix_repetition_suffix_len": 256,
        "prefix_repetition_num_prefixes": 10,
        "prefix_repetition_output_len": 128,
    }
)
# Flags that some datasets know, and which.
FLAGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "dataset_path": ("trace", "sharegpt"),
        "no_oversample": ("trace", "sharegpt"),
        "paper_filter": ("trace", *PUBLISHED),
        "input_len": ("random",),
        "output_len": ("random", "sharegpt"),
        "sharegpt_output_len": ("sharegpt",),
        "random_input_len": ("random",),
        "random_output_len": ("random",),
        "random_range_ratio": ("random",),
        "random_prefix_len": ("random",),
        **dict.fromkeys(PREFIX_REPETITION, ("prefix_repetition",)),
    }
)


@dataclass(frozen=True, slots=True)
class Target:
    """What requests must fit."""

    max_total: int  # tokens of prompt and output
    vocab_size: int
    tokenizer: Tokenizer | None

    @property
    def special_ids(self) -> Collection[int]:
        return () if self.tokenizer is None else self.tokenizer.special_ids


# (count, target, random numbers) -> requests
Draw: TypeAlias = Callable[[int, Target, np.random.Generator], list[Request]]


@dataclass(frozen=True, slots=True)
class Workload:
    name: str  # "512x512", or the trace's
    num_prompts: int
    draw: Draw


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset-name", choices=DATASETS, default="random", help="(default: random)")
    add(
        "--dataset-path", type=Path, help="CSV of lengths, for trace; ShareGPT's JSON, for sharegpt"
    )
    add("--no-oversample", action="store_true", help="use no request of the file twice")
    add(
        "--paper-filter",
        action="store_true",
        help="leave out what the NanoFlow paper's harness does: prompts above 3072 tokens, outputs "
        "above 1024, both together above 4096",
    )
    add("--input-len", type=int, help="as --random-input-len")
    add("--output-len", type=int, help="as --random-output-len or --sharegpt-output-len")
    add("--sharegpt-output-len", type=int, help="of all outputs (default: of the answers)")
    add("--random-input-len", type=int, help="mean prompt tokens (default: 1024)")
    add("--random-output-len", type=int, help="mean output tokens (default: 128)")
    add(
        "--random-range-ratio",
        type=float,
        help="lengths are uniform in [L * (1 - r), L * (1 + r)] (default: 0.0)",
    )
    add("--random-prefix-len", type=int, help="equal tokens before each prompt (default: 0)")
    for name, default in PREFIX_REPETITION.items():
        add(_flag(name), type=int, help=f"(default: {default})")
    add("--num-prompts", type=int, help=f"(default: {NUM_PROMPTS})")
    add("--num-warmups", type=int, default=0, help="requests run before, uncounted (default: 0)")


def make_workload(options: argparse.Namespace, num_prompts: int = NUM_PROMPTS) -> Workload:
    """Reads the dataset's file, and checks the flags. Raises ValueError, OSError.

    `num_prompts`: where the flags do not say it.
    """
    count = num_prompts if options.num_prompts is None else options.num_prompts
    if count < 1 or options.num_warmups < 0:
        raise ValueError(
            f"--num-prompts {count} must be at least 1, --num-warmups {options.num_warmups} at "
            "least 0"
        )
    dataset = options.dataset_name
    values = {name: getattr(options, name) for name in FLAGS}
    given = {
        name: value for name, value in values.items() if value is not None and value is not False
    }
    for name in given:
        if dataset not in FLAGS[name]:
            raise ValueError(f"{_flag(name)} is for --dataset-name {' or '.join(FLAGS[name])}")
    if dataset in ("trace", "sharegpt") and "dataset_path" not in given:
        raise ValueError(f"--dataset-name {dataset} needs --dataset-path FILE")
    prefix = "sharegpt" if dataset == "sharegpt" else "random"
    for side in ("input_len", "output_len"):
        if side in given and f"{prefix}_{side}" in given:
            raise ValueError(
                f"{_flag(side)} and {_flag(f'{prefix}_{side}')} are the same: give one of them"
            )
    make = {
        "random": _random,
        "sharegpt": _sharegpt,
        "trace": _trace,
        "prefix_repetition": _prefix_repetition,
    }.get(dataset)
    name, draw = make(given) if make is not None else _published(dataset, given)
    return Workload(name, count, draw)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _random(given: Mapping[str, Any]) -> tuple[str, Draw]:
    mean_input = int(given.get("input_len", given.get("random_input_len", 1024)))
    mean_output = int(given.get("output_len", given.get("random_output_len", 128)))
    ratio = given.get("random_range_ratio", 0.0)
    prefix_len = given.get("random_prefix_len", 0)
    if prefix_len < 0:
        raise ValueError(f"--random-prefix-len {prefix_len} must be at least 0")

    def draw(count: int, target: Target, rng: np.random.Generator) -> list[Request]:
        lengths = random_lengths(mean_input, mean_output, ratio, count, rng)
        longest = prefix_len + max((one.input + one.output for one in lengths), default=0)
        if longest > target.max_total:
            raise ValueError(
                f"requests of up to {longest} tokens exceed max_model_len {target.max_total}: "
                "lower --random-input-len or --random-output-len, or raise --max-model-len"
            )
        return _of_random_tokens(lengths, target, rng, prefix_len)

    name = f"{mean_input}x{mean_output}" + (f"-r{ratio:g}" if ratio else "")
    return name + (f"-p{prefix_len}" if prefix_len else ""), draw


def _trace(given: Mapping[str, Any]) -> tuple[str, Draw]:
    path = given["dataset_path"]
    trace = read_trace(path)
    if "paper_filter" in given:
        trace = [lengths for lengths in trace if passes_filter(lengths)]
    oversample = "no_oversample" not in given

    def draw(count: int, target: Target, rng: np.random.Generator) -> list[Request]:
        lengths = sample_trace(trace, count, target.max_total, rng, oversample=oversample)
        return _of_random_tokens(lengths, target, rng)

    return path.stem + _filtered(given), draw


def _sharegpt(given: Mapping[str, Any]) -> tuple[str, Draw]:
    conversations = read_conversations(given["dataset_path"])
    output_len = given.get("output_len", given.get("sharegpt_output_len"))
    if output_len is not None and output_len < 1:
        raise ValueError(f"--output-len {output_len} must be at least 1")
    oversample = "no_oversample" not in given

    def draw(count: int, target: Target, rng: np.random.Generator) -> list[Request]:
        if target.tokenizer is None:
            raise ValueError("--dataset-name sharegpt needs a tokenizer: no --skip-tokenizer-init")
        return sample_conversations(
            conversations,
            count,
            target.max_total,
            target.tokenizer,
            rng,
            output_len=output_len,
            oversample=oversample,
        )

    return "sharegpt", draw


def _prefix_repetition(given: Mapping[str, Any]) -> tuple[str, Draw]:
    numbers = {**PREFIX_REPETITION, **given}
    for name in PREFIX_REPETITION:
        if numbers[name] < 1:
            raise ValueError(f"{_flag(name)} {numbers[name]} must be at least 1")
    prefix_len, suffix_len, prefixes, output_len = (numbers[name] for name in PREFIX_REPETITION)
    total = prefix_len + suffix_len + output_len

    def draw(count: int, target: Target, rng: np.random.Generator) -> list[Request]:
        if total > target.max_total:
            raise ValueError(f"requests of {total} tokens exceed max_model_len {target.max_total}")
        requests: list[Request] = []
        for shared in range(prefixes):  # as evenly as it goes
            lengths = [Lengths(suffix_len, output_len)] * (
                (count * (shared + 1)) // prefixes - (count * shared) // prefixes
            )
            requests += _of_random_tokens(lengths, target, rng, prefix_len)
        return [requests[index] for index in rng.permutation(count)]

    return f"prefix-{prefixes}x{prefix_len}-{suffix_len}x{output_len}", draw


def _published(dataset: str, given: Mapping[str, Any]) -> tuple[str, Draw]:
    is_filtered = "paper_filter" in given

    def draw(count: int, target: Target, rng: np.random.Generator) -> list[Request]:
        lengths = published_lengths(dataset, count, target.max_total, rng, is_filtered=is_filtered)
        return _of_random_tokens(lengths, target, rng)

    return dataset + _filtered(given), draw


def _filtered(given: Mapping[str, Any]) -> str:
    return "-filtered" if "paper_filter" in given else ""


def _of_random_tokens(
    lengths: list[Lengths], target: Target, rng: np.random.Generator, prefix_len: int = 0
) -> list[Request]:
    return random_requests(
        lengths, target.vocab_size, target.special_ids, rng, prefix_len=prefix_len
    )
