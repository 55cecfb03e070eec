"""Tiers below the KV cache: what they cost where nothing is said again, and bring where it is.

Usage: python bench/multi_round.py [--output-json FILE]
       python bench/multi_round.py --device cuda [--ssd DIR:GIB] --output-json FILE

One engine after the other: without prefix caching, with it, with a host tier, with a small one
above an SSD. Each first runs --unique requests that have nothing in common, where tiers cannot
help. Then conversations (bench/talk.py): each is a task that asks, waits for the answer, thinks,
and asks again with all that was said so far in front. The KV cache of the device is too small for
those that are open, so that what prefix caching alone keeps of a round is gone when the next comes.

With --device cuda it is the shape of Llama-3.1-8B with random weights, sized for about two minutes;
what has been measured is in the JSON file after each engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import numpy as np

from multi_round_rows import Row, Unique, beside_off, cost_without_reuse
from nanoflow import AsyncLLM
from nanoflow.bench import environment
from nanoflow.bench.default_model import default_model
from nanoflow.bench.result import gpu_name
from nanoflow.scheduler.stats import StepStats
from shapes import SHAPES, write_model
from talk import conversations, hold, metrics_of

ROUNDS = 5
MODES = ("off", "prefix", "host", "host+ssd")
REPEATS = 2  # of the requests that have nothing in common, after once to warm up
TIER_METRICS = ("offload", "external", "preempt")
START = perf_counter()
# Options that are not given: on a CPU, on a GPU.
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "shape": (None, "llama-3.1-8b"),
    "conversations": (10, 160),
    "scale": (0.25, 0.6),
    "think": (2.0, 0.5),
    "block_size": (16, 64),
    "num_pages": (80, 1000),
    "max_model_len": (None, 8192),
    "host_gib": (1.0, 24.0),
    "small_host_gib": (0.05, 6.0),
    "unique": (16, 250),
}


def say(text: str) -> None:
    print(f"[{perf_counter() - START:6.1f} s] {text}", flush=True)


def arguments(options: argparse.Namespace, mode: str) -> dict[str, Any]:
    common: dict[str, Any] = {
        "device": options.device,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "block_size": options.block_size,
        "num_gpu_blocks_override": options.num_pages,
        "schedule": options.schedule,
    }
    if options.device == "cpu":
        common["cpu_threads"] = options.threads
    if options.max_model_len is not None:
        common["max_model_len"] = options.max_model_len
    if options.shape is not None:
        common["load_format"] = "dummy"
    if mode == "off":
        return common | {"enable_prefix_caching": False}
    if mode == "host":
        return common | {"kv_offloading_size": options.host_gib}
    if mode == "host+ssd":
        tiers = {"kv_offloading_size": options.small_host_gib, "kv_offloading_ssd": options.ssd}
        return common | tiers
    return common


def run_unique(llm: AsyncLLM, mode: str, options: argparse.Namespace) -> Unique:
    held = []
    for repeat in range(1 + REPEATS):
        talk = conversations(
            options.unique,
            1,
            scale=options.scale,
            think=0.0,
            vocab_size=llm._runtime.vocab_size,
            seed=1 + repeat,
        )
        held.append(hold(llm, f"unique-{repeat}", talk))
        say(
            f"{mode}: {options.unique} requests with nothing in common, "
            f"{held[-1].total_tokens_per_second:,.1f} tok/s, {held[-1].cpu_seconds:.1f} s CPU, "
            f"device idle at most {held[-1].device_idle:.2%}" + (", warm-up" if not repeat else "")
        )
    asyncio.run(llm.reset_prefix_cache())
    return Unique(
        requests=options.unique,
        total_tokens_per_second=[one.total_tokens_per_second for one in held[1:]],
        cpu_seconds=[one.cpu_seconds for one in held[1:]],
        device_idle=mean(one.device_idle for one in held[1:]),
    )


def run(options: argparse.Namespace, mode: str) -> tuple[Row, list[list[int]], str]:
    """On an engine of its own; also what was said in the conversations, and the device's name."""
    say(f"{mode}: starting")
    llm = AsyncLLM(options.model, **arguments(options, mode))
    say(f"{mode}: started")
    computed: list[int] = []

    def count(stats: StepStats) -> None:
        computed.append(stats.prefill_tokens)

    try:
        unique = run_unique(llm, mode, options) if options.unique and mode != "off" else None
        before = metrics_of(llm)
        llm._runtime.loop.step_listener = count
        rounds = conversations(
            options.conversations,
            options.rounds,
            scale=options.scale,
            think=options.think,
            vocab_size=llm._runtime.vocab_size,
        )
        talk = hold(llm, "talk", rounds)
        after = metrics_of(llm)
        device = llm._runtime.device
    finally:
        llm.shutdown()
    of_tiers = [name for name in after if any(part in name for part in TIER_METRICS)]
    rates = {
        name.rpartition(":")[2]: value / after[name.replace("bytes", "time")]
        for name, value in after.items()
        if name.startswith("kv_offload_total_bytes") and value > 0
    }
    row = Row(
        mode=mode,
        seconds=talk.seconds,
        cpu_seconds=talk.cpu_seconds,
        prompt_tokens=talk.prompt_tokens,
        output_tokens=talk.output_tokens,
        prefill_tokens_computed=sum(computed),
        total_tokens_per_second=talk.total_tokens_per_second,
        mean_first_token_seconds=mean(talk.first_tokens) if talk.first_tokens else 0.0,
        device_idle=talk.device_idle,
        metrics={
            name: after[name] - (0 if "usage" in name else before.get(name, 0)) for name in of_tiers
        },
        bytes_per_second=rates,
        unique=unique,
    )
    say(
        f"{mode}: {row.seconds:.2f} s ({row.cpu_seconds:.1f} s CPU), "
        f"{row.prefill_tokens_computed:,} prefill tokens, "
        f"{row.total_tokens_per_second:,.1f} tok/s, first token "
        f"{row.mean_first_token_seconds:.3f} s, device idle at most {row.device_idle:.2%}"
        + "".join(f", {name} {rate / 1e9:.2f} GB/s" for name, rate in rates.items())
    )
    return row, talk.said, device


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda; other defaults follow it")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--schedule", default="sequential", help="one: auto would try several")
    parser.add_argument("--model", help="the default of a CPU is SmolLM2-135M-Instruct")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--conversations", type=int)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--scale", type=float, help="of the lengths of LMSYS")
    parser.add_argument("--think", type=float, help="seconds between rounds, mean")
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--num-pages", type=int, help="of the device")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--host-gib", type=float)
    parser.add_argument("--small-host-gib", type=float, help="above the SSD")
    parser.add_argument("--ssd", help="PATH:GIB; the default is a temporary folder of --host-gib")
    parser.add_argument("--unique", type=int, help="requests without reuse; 0: none")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    options = parser.parse_args()
    for name, of_device in DEFAULTS.items():
        is_given = getattr(options, name) is not None or (name == "shape" and options.model)
        if not is_given:
            setattr(options, name, of_device[options.device != "cpu"])
    return options


def main() -> None:
    options = parse()
    folder = Path(tempfile.mkdtemp())
    try:
        measure(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(options: argparse.Namespace, folder: Path) -> None:
    if options.shape is not None:
        options.model = write_model(folder, options.shape)
    elif options.model is None:
        options.model = default_model()
    options.ssd = options.ssd or f"{folder / 'ssd'}:{options.host_gib}"
    rows: list[Row] = []
    answers: list[list[list[int]]] = []
    for mode in options.modes:
        row, said, device = run(options, mode)
        rows.append(row)
        answers.append(said)
        save(options, device, rows, answers)


def save(
    options: argparse.Namespace, device: str, rows: list[Row], answers: list[list[list[int]]]
) -> None:
    same = [
        float(np.mean([a == b for a, b in zip(answers[0], said, strict=True)])) for said in answers
    ]
    result: dict[str, Any] = {
        **environment.origin(options.commit),
        "cpu": environment.cpu_model(),
        "device": device,
        "gpu": gpu_name(device),
        "model": options.shape or str(options.model),
        "conversations": options.conversations,
        "rounds": options.rounds,
        "think_seconds": options.think,
        "scale": options.scale,
        "device_tokens": options.num_pages * options.block_size,
        "host_gib": {"host": options.host_gib, "host+ssd": options.small_host_gib},
        "results": [asdict(row) for row in rows],
        "conversations_said_as_in_the_first_mode": same,
    }
    if "off" in {row.mode for row in rows}:
        result["beside_off"] = beside_off(rows)
        say(f"beside off: {json.dumps(result['beside_off'])}")
    modes = {row.mode for row in rows if row.unique is not None}
    if "prefix" in modes and len(modes) > 1:
        result["without_reuse"] = cost_without_reuse(rows)
        say(f"without reuse: {json.dumps(result['without_reuse'])}")
    if options.output_json is not None:
        options.output_json.parent.mkdir(parents=True, exist_ok=True)
        options.output_json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
