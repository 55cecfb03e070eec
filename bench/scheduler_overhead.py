"""What the scheduler costs per step: all its Python work.

Usage: python bench/scheduler_overhead.py [--running 256 1024] [--output-json FILE]
       python bench/scheduler_overhead.py --shape tiny
       python bench/scheduler_overhead.py --shape llama-3.1-8b --device cuda --input-len 256 \\
           --output-len 256

Requests arrive, decode and end in a steady flow, so the steps measured hold decodes, prefill
chunks, admissions and ends. With --shape they run on the engine, a model of random weights, which
works on the step before meanwhile; without it on one that returns at once, given the real batches
of `nanoflow._core`.
"""

from __future__ import annotations

import argparse
import json
import queue
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow import LLM, _core
from nanoflow.bench import environment
from nanoflow.bench.result import gpu_name
from nanoflow.request import Request, Sampling
from nanoflow.scheduler.deal import Dealer
from nanoflow.scheduler.loop import SchedulerLoop
from nanoflow.scheduler.pages import PageAllocator
from nanoflow.scheduler.policy import Policy
from nanoflow.scheduler.slots import Slots
from nanoflow.scheduler.state import SchedulerState
from nanoflow.scheduler.stats import StepListener, StepStats
from shapes import SHAPES, write_model

PAGE_SIZE = 64
EOS_TOKEN_IDS = (128_001, 128_008, 128_009)
WARM_UP_STEPS = 50
SEED = 0
INSTANT = "an engine that returns at once"
TARGET_MS = {256: 1.0, 1024: 3.0}


@dataclass(frozen=True)
class Result:
    tokens: NDArray[np.int32]
    logprobs: None = None


class InstantEngine:
    """Completes every step when it is submitted; no token ends a request."""

    def __init__(self) -> None:
        self.completed_steps = 0
        self._rng = np.random.default_rng(SEED)

    def submit(self, batch: tuple[_core.Batch, int]) -> Handle:
        self.completed_steps += 1
        tokens = self._rng.integers(0, 100_000, batch[1], dtype=np.int32)
        return Handle(self.completed_steps, Result(tokens))


@dataclass(frozen=True)
class Handle:
    step: int
    result: Result

    def is_done(self) -> bool:
        return True

    def wait(self) -> Result:
        return self.result


def make_batch(**arrays: NDArray[Any]) -> tuple[_core.Batch, int]:
    return _core.Batch(**arrays), len(arrays["slots"])


@dataclass(frozen=True)
class Running:
    """A scheduler over an engine."""

    loop: SchedulerLoop
    state: SchedulerState
    vocab_size: int
    device: str | None  # None of an engine that returns at once
    close: Callable[[], None]


@dataclass(frozen=True)
class Moment:
    """Seconds since the start, at the end of a step."""

    cpu: float  # of the scheduler's thread
    open: float  # while there were requests
    idle: float  # of them, those in which the device may have had nothing to do


def start_instant(running: int, options: argparse.Namespace, listen: StepListener) -> Running:
    max_model_len = options.input_len + 2 * options.output_len
    state = SchedulerState(
        Policy(Dealer(options.cuts, running), options.max_num_batched_tokens),
        Slots(running, max_model_len, PAGE_SIZE),
        PageAllocator(running * -(-max_model_len // PAGE_SIZE)),
    )
    loop = SchedulerLoop(InstantEngine(), make_batch, state, step_listener=listen)
    return Running(loop, state, 100_000, None, loop.close)


def start_real(running: int, options: argparse.Namespace, listen: StepListener) -> Running:
    max_model_len = options.input_len + 2 * options.output_len
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            write_model(Path(folder), options.shape),
            load_format="dummy",
            skip_tokenizer_init=True,
            device=options.device,
            max_model_len=max_model_len,
            max_num_seqs=running,
            max_num_batched_tokens=options.max_num_batched_tokens,
            block_size=PAGE_SIZE,
            num_gpu_blocks_override=running * -(-max_model_len // PAGE_SIZE),
            schedule=options.schedule,
            disable_log_stats=True,
        )
    llm.step_listener = listen
    runtime = llm._runtime
    return Running(
        runtime.loop, runtime.state, runtime.vocab_size, llm.device_description, llm.close
    )


def make_requests(
    count: int, vocab_size: int, options: argparse.Namespace, done: queue.SimpleQueue
) -> list[Request]:
    """Output lengths of the first batch are spread, so that requests do not end all at once."""
    rng = np.random.default_rng(SEED)
    requests = []
    for number in range(count):
        prompt = rng.integers(3, vocab_size, options.input_len, dtype=np.int32)
        output_len = int(rng.integers(1, 2 * options.output_len))
        sampling = Sampling(1.0, 0.9, 50, 0.0, number, 0, (), EOS_TOKEN_IDS, False)
        max_len = len(prompt) + output_len
        requests.append(Request(str(number), prompt, sampling, max_len, done.put))
    return requests


def measure(running: int, options: argparse.Namespace) -> dict[str, Any]:
    """Costs of the steps in which at least 95% of `running` requests decode."""
    heard: list[StepStats] = []
    moments: dict[int, Moment] = {}  # by step

    def listen(stats: StepStats) -> None:
        times = engine.state.counters.engine_times
        moments[stats.step] = Moment(time.thread_time(), times.open, times.idle)
        heard.append(stats)

    done: queue.SimpleQueue[Request] = queue.SimpleQueue()
    start = start_instant if options.shape is None else start_real
    engine = start(running, options, listen)
    requests_per_step = 1.5 * running / options.output_len
    count = running + int(requests_per_step * (options.steps + 2 * WARM_UP_STEPS)) + running
    engine.loop.submit(make_requests(count, engine.vocab_size, options, done))
    while True:
        time.sleep(0.5)
        full = [stats for stats in list(heard) if stats.decode_tokens >= 0.95 * running]
        if len(full) >= WARM_UP_STEPS + options.steps or not engine.state.has_requests:
            break
    engine.close()
    steps = full[WARM_UP_STEPS : WARM_UP_STEPS + options.steps]
    if len(steps) < 2:
        raise SystemExit(
            f"{running} requests hardly ever ran together: try more --steps, or a lower --input-len"
        )
    first, last = moments[steps[0].step], moments[steps[-1].step]
    cpu_seconds = (last.cpu - first.cpu) / (steps[-1].step - steps[0].step)
    device_idle = (last.idle - first.idle) / (last.open - first.open)
    seconds = np.array([stats.scheduler_seconds for stats in steps])
    return {
        "running": running,
        "engine": f"{options.shape} on {engine.device}" if options.shape else INSTANT,
        "steps": len(steps),
        "mean_decode_tokens": float(np.mean([stats.decode_tokens for stats in steps])),
        "mean_prefill_tokens": float(np.mean([stats.prefill_tokens for stats in steps])),
        "mean_ms": float(seconds.mean() * 1e3),
        "cpu_ms": float(cpu_seconds * 1e3),  # which other processes change little
        "median_ms": float(np.median(seconds) * 1e3),
        "p99_ms": float(np.quantile(seconds, 0.99) * 1e3),
        "target_ms": TARGET_MS.get(running),
        "device_idle": device_idle if options.shape else None,  # share of the time, at most
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--running", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=512, help="mean; uniform from 1 to twice")
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    parser.add_argument("--cuts", type=float, nargs="*", default=[0.5], help="without --shape")
    parser.add_argument("--shape", choices=SHAPES, help="of the model, on the engine")
    parser.add_argument("--device", default="cpu", help="of the engine")
    parser.add_argument("--schedule", default="nano", help="of the engine")
    parser.add_argument("--steps", type=int, default=500, help="measured, after a warm-up")
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    results = [measure(running, options) for running in options.running]
    for row in results:
        print(
            f"{row['running']:>5} running: mean {row['mean_ms']:.3f} ms (CPU "
            f"{row['cpu_ms']:.3f}), median "
            f"{row['median_ms']:.3f} ms, p99 {row['p99_ms']:.3f} ms per step of "
            f"{row['mean_decode_tokens']:.0f} decode and {row['mean_prefill_tokens']:.0f} prefill "
            "tokens"
        )
    if options.output_json is not None:
        report = {
            "benchmark": "scheduler_overhead",
            **environment.origin(options.commit),
            "device": environment.cpu_model(),
            "gpu": gpu_name(str(results[0]["engine"]).partition(" on ")[2]),
            "seed": SEED,
            "warm_up": f"{WARM_UP_STEPS} steps, not counted",
            "results": results,
        }
        options.output_json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
