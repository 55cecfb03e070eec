"""What over-admission costs an engine: admission by the forecast, and by vLLM's rule beside it.

python bench/over_admission.py --shape llama-3.1-8b --device cuda --output-json FILE

bench/admission.py simulates the same. Here one engine, a model of random weights, runs the same
requests once by each rule, up to --max-num-seqs at once, which is 1,024 by vLLM's default on a
large GPU, and with too small a cache for that.
"""

from __future__ import annotations

import argparse
import json
import queue
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from admission import FULL
from blind import AdmitWhatFits
from nanoflow import LLM
from nanoflow.bench import environment
from nanoflow.bench.result import gpu_name
from nanoflow.request import Request, Sampling
from nanoflow.scheduler.admission import Admission
from nanoflow.scheduler.stats import StepStats
from shapes import SHAPES, write_model

PAGE_SIZE = 64
SEED = 0
RULES: dict[str, type[Admission]] = {"forecast": Admission, "vllm": AdmitWhatFits}


@dataclass(frozen=True)
class Row:
    """The steady state is what lies between the first step with FULL of the pages (the first step,
    if none has) and the last one behind which somebody waits."""

    admission: str
    requests: int
    seconds: float
    steps: int
    total_tokens_per_second: float  # prompts and outputs, over the whole run
    preempted: float  # share of requests that gave way at least once
    preemptions: int
    recomputed_tokens: int  # after preemptions
    steady_pages_granted: float  # share of all, mean
    steady_running: float  # mean
    most_running: int


def start(options: argparse.Namespace) -> LLM:
    with tempfile.TemporaryDirectory() as folder:
        return LLM(
            write_model(Path(folder), options.shape),
            load_format="dummy",
            skip_tokenizer_init=True,
            device=options.device,
            schedule=options.schedule,
            max_model_len=options.input_len + options.output_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            block_size=PAGE_SIZE,
            num_gpu_blocks_override=options.kv_tokens // PAGE_SIZE,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )


def run(llm: LLM, rule: str, count: int, options: argparse.Namespace) -> Row:
    """So many requests by one rule; nothing else runs on the engine."""
    runtime, state = llm._runtime, llm._runtime.state
    pages = state.pages.num_pages
    state.admission = RULES[rule](pages, options.max_num_seqs, PAGE_SIZE)
    rng = np.random.default_rng(SEED)
    done: queue.SimpleQueue[Request] = queue.SimpleQueue()
    requests = []
    for number in range(count):
        prompt = rng.integers(0, runtime.vocab_size, options.input_len, dtype=np.int32)
        sampling = Sampling(0.0, 1.0, 0, 0.0, number, 0, (), (), True)
        max_len = options.input_len + options.output_len
        requests.append(Request(f"{rule}-{number}", prompt, sampling, max_len, done.put))
    heard: list[StepStats] = []
    llm.step_listener = heard.append
    begin = perf_counter()
    runtime.loop.submit(requests)
    for request in (done.get() for _ in requests):
        if request.finish_reason != "length":
            raise RuntimeError(f"request {request.id} failed") from request.error
    seconds = perf_counter() - begin
    held = np.array([1 - stats.free_pages / pages for stats in heard])
    waiting = np.flatnonzero([stats.waiting > 0 for stats in heard])
    steady = slice(int(np.argmax(held >= FULL)), int(waiting[-1]) + 1 if len(waiting) else None)
    running = np.array([stats.running for stats in heard])
    prefilled = sum(stats.prefill_tokens for stats in heard)
    return Row(
        admission=rule,
        requests=count,
        seconds=seconds,
        steps=len(heard),
        total_tokens_per_second=count * (options.input_len + options.output_len) / seconds,
        preempted=sum(request.num_preemptions > 0 for request in requests) / count,
        preemptions=sum(request.num_preemptions for request in requests),
        recomputed_tokens=prefilled - count * options.input_len,
        steady_pages_granted=float(held[steady].mean()),
        steady_running=float(running[steady].mean()),
        most_running=int(running.max()),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--schedule", default="sequential")
    parser.add_argument("--num-prompts", type=int, default=1000)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--kv-tokens", type=int, default=232_448)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    rows = []
    with start(options) as llm:
        device = llm.device_description
        run(llm, "forecast", min(32, options.num_prompts), options)  # kernels, graphs
        for rule in RULES:
            row = run(llm, rule, options.num_prompts, options)
            rows.append(row)
            print(
                f"{rule:>8}: {row.seconds:.1f} s, {row.total_tokens_per_second:,.0f} tokens/s, "
                f"preempted {row.preempted:.2%} of requests, {row.recomputed_tokens:,} tokens "
                f"computed again; steady: {row.steady_pages_granted:.1%} of pages, "
                f"{row.steady_running:.0f} running, {row.most_running} at most",
                flush=True,
            )
    if options.output_json is not None:
        report = {
            "benchmark": "over_admission",
            **environment.origin(options.commit),
            "device": device,
            "gpu": gpu_name(device),
            "model": options.shape,
            "seed": SEED,
            "kv_tokens": options.kv_tokens // PAGE_SIZE * PAGE_SIZE,
            "warm_up": "32 requests, not counted",
            "results": [asdict(row) for row in rows],
        }
        options.output_json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
