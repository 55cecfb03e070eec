"""Conversations of several rounds, with and without tiers below the KV cache.

Usage: python bench/multi_round.py [--output-json FILE]
       python bench/multi_round.py --device cuda --shape llama-3.1-8b --scale 1 --block-size 64 \
           --conversations 400 --num-pages 2400 --think 20 --host-gib 90 --small-host-gib 20 \
           --ssd DIR:90 --unique 1500

Each conversation is a task that asks, waits for the answer, thinks, and asks again with all that
was said so far in front. Lengths are log-normal about the means of LMSYS-Chat-1M (102 tokens asked,
222 answered, as the NanoFlow paper has them), times --scale. The KV cache of the device is too
small for the conversations that are open, so that what prefix caching alone keeps of a round is
gone when the next one comes. After that, --unique requests that have nothing in common: what the
tiers cost where they cannot help.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from time import perf_counter, process_time
from typing import Any

import numpy as np

from nanoflow import AsyncLLM, SamplingParams
from nanoflow.bench import environment
from nanoflow.bench.default_model import default_model
from nanoflow.scheduler.stats import StepStats
from shapes import SHAPES, write_model

MEAN_ASKED, MEAN_ANSWERED = 102, 222
SIGMA = 1.0  # of the logarithms: the standard deviations are as large as the means, as there
ROUNDS = 5
MODES = ("off", "prefix", "host", "host+ssd")
REPEATS = 3  # of the requests that have nothing in common, with and without tiers by turns


@dataclass(frozen=True)
class Round:
    asked: list[int]  # token ids
    answered: int  # tokens
    think: float  # seconds before it


@dataclass
class Row:
    mode: str
    seconds: float
    cpu_seconds: float  # of this process, which other processes on the machine change little
    prompt_tokens: int
    output_tokens: int
    prefill_tokens_computed: int  # with what preemptions made necessary again
    total_tokens_per_second: float
    mean_first_token_seconds: float  # from the second round on
    metrics: dict[str, float]  # of the tiers


def conversations(options: argparse.Namespace, vocab_size: int) -> list[list[Round]]:
    rng = np.random.default_rng(0)

    def length(mean_length: float) -> int:
        drawn = rng.lognormal(np.log(mean_length * options.scale) - SIGMA**2 / 2, SIGMA)
        return int(np.clip(drawn, 2, 4 * mean_length * options.scale))

    return [
        [
            Round(
                rng.integers(2, vocab_size, length(MEAN_ASKED)).tolist(),
                length(MEAN_ANSWERED),
                float(rng.exponential(options.think)),
            )
            for _ in range(options.rounds)
        ]
        for _ in range(options.conversations)
    ]


def arguments(options: argparse.Namespace, mode: str) -> dict[str, Any]:
    common: dict[str, Any] = {
        "device": options.device,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "block_size": options.block_size,
        "num_gpu_blocks_override": options.num_pages,
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


async def answer(
    llm: AsyncLLM, name: str, prompt: list[int], tokens: int
) -> tuple[list[int], float]:
    """The tokens of an answer, and the seconds until the first."""
    params = SamplingParams(
        temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
    )
    begin, first = perf_counter(), 0.0
    output: list[int] = []
    async for news in llm.generate({"prompt_token_ids": prompt}, params, name):
        first = first or perf_counter() - begin
        output = list(news.outputs[0].token_ids)
    assert len(output) == tokens, f"{len(output)} of {tokens} tokens"
    return output, first


async def converse(
    llm: AsyncLLM, number: int, rounds: list[Round], first_tokens: list[float]
) -> list[int]:
    """All that is said; appends the waits for the first token of all rounds but the first."""
    said: list[int] = []
    for turn, one in enumerate(rounds):
        await asyncio.sleep(one.think)
        said += one.asked
        tokens, first = await answer(llm, f"{number}-{turn}", said, one.answered)
        said = said + tokens
        if turn > 0:
            first_tokens.append(first)
    return said


def run(
    options: argparse.Namespace, mode: str, talk: list[list[Round]]
) -> tuple[Row, list[list[int]]]:
    """A fresh engine for all conversations; and what was said in them."""
    computed: list[int] = []
    first_tokens: list[float] = []

    def count(stats: StepStats) -> None:
        computed.append(stats.prefill_tokens)

    async def all_of_them() -> list[list[int]]:
        tasks = (converse(llm, n, rounds, first_tokens) for n, rounds in enumerate(talk))
        return await asyncio.gather(*tasks)

    llm = AsyncLLM(options.model, **arguments(options, mode))
    try:
        llm._runtime.loop.step_listener = count
        begin, cpu_begin = perf_counter(), process_time()
        said = asyncio.run(all_of_them())
        seconds, cpu_seconds = perf_counter() - begin, process_time() - cpu_begin
        metrics = {
            metric_name(metric): metric.value
            for metric in llm.get_metrics()
            if "offload" in metric.name or "external" in metric.name or "preempt" in metric.name
        }
    finally:
        llm.shutdown()
    output_tokens = sum(one.answered for rounds in talk for one in rounds)
    prompt_tokens = 0
    for rounds in talk:
        length = 0
        for one in rounds:
            length += len(one.asked)
            prompt_tokens += length
            length += one.answered
    row = Row(
        mode=mode,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefill_tokens_computed=sum(computed),
        total_tokens_per_second=(prompt_tokens + output_tokens) / seconds,
        mean_first_token_seconds=mean(first_tokens) if first_tokens else 0.0,
        metrics=metrics,
    )
    print(
        f"{mode:>9}: {row.seconds:7.2f} s ({row.cpu_seconds:.1f} s CPU), "
        f"{row.prefill_tokens_computed:8,} prefill tokens, "
        f"{row.total_tokens_per_second:9,.1f} tok/s, first token "
        f"{row.mean_first_token_seconds:.3f} s",
        flush=True,
    )
    return row, said


def metric_name(metric: Any) -> str:
    own = [value for name, value in metric.labels.items() if name not in ("model_name", "engine")]
    return ":".join([metric.name.removeprefix("nanoflow:"), *own])


def cost_without_reuse(options: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """Throughput of requests that have nothing in common, with tiers and without by turns."""
    single = argparse.Namespace(**vars(options))
    single.conversations, single.rounds, single.think = options.unique, 1, 0.0
    talk = conversations(single, vocab_size)
    rates: dict[str, list[float]] = {"prefix": [], "host": []}
    cpu: dict[str, list[float]] = {"prefix": [], "host": []}
    for repeat in range(REPEATS):
        for mode in sorted(rates, reverse=repeat % 2 == 1):
            row, _ = run(single, mode, talk)
            rates[mode].append(row.total_tokens_per_second)
            cpu[mode].append(row.cpu_seconds)
    medians = {mode: median(values) for mode, values in rates.items()}
    return {
        "requests": options.unique,
        "total_tokens_per_second": rates,
        "median": medians,
        "lost": 1 - medians["host"] / medians["prefix"],
        "cpu_seconds": cpu,
        "cpu_seconds_added": median(cpu["host"]) / median(cpu["prefix"]) - 1,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--model", help="the default is SmolLM2-135M-Instruct")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--conversations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--scale", type=float, default=0.25, help="of the lengths of LMSYS")
    parser.add_argument("--think", type=float, default=2.0, help="seconds between rounds, mean")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--num-pages", type=int, default=80, help="of the device")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--host-gib", type=float, default=1.0)
    parser.add_argument("--small-host-gib", type=float, default=0.05, help="above the SSD")
    parser.add_argument("--ssd", help="PATH:SIZE; the default is a temporary folder of 1 GiB")
    parser.add_argument("--unique", type=int, default=16, help="requests without reuse; 0: none")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--output-json", type=Path)
    return parser.parse_args()


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
    options.ssd = options.ssd or f"{folder / 'ssd'}:1"
    with_vocabulary = AsyncLLM(options.model, **arguments(options, "prefix"))
    vocab_size, device = with_vocabulary._runtime.vocab_size, with_vocabulary._runtime.device
    with_vocabulary.shutdown()
    talk = conversations(options, vocab_size)
    rows, answers = [], []
    for mode in options.modes:
        row, said = run(options, mode, talk)
        rows.append(row)
        answers.append(said)
    same = [
        float(np.mean([a == b for a, b in zip(answers[0], said, strict=True)])) for said in answers
    ]
    result: dict[str, Any] = {
        "command": environment.command_line(),
        "commit": environment.commit(),
        "versions": environment.versions(),
        "cpu": environment.cpu_model(),
        "device": device,
        "conversations": options.conversations,
        "rounds": options.rounds,
        "device_tokens": options.num_pages * options.block_size,
        "results": [asdict(row) for row in rows],
        "conversations_said_as_in_the_first_mode": same,
    }
    if options.unique:
        result["without_reuse"] = cost_without_reuse(options, vocab_size)
        cost = result["without_reuse"]
        print(f"without reuse: {cost['lost']:.1%} of the throughput lost, ", end="")
        print(f"{cost['cpu_seconds_added']:.1%} more CPU time")
    if options.output_json is not None:
        options.output_json.parent.mkdir(parents=True, exist_ok=True)
        options.output_json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
