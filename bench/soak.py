"""Runs random requests for many steps and checks that nothing leaks.

python bench/soak.py --device cuda --output-json soak.json  # two layers of Llama-3.1-8B's width
python bench/soak.py --model tiny                           # on a CPU

Prompts and outputs of random lengths, some beginning alike, every way of sampling, aborts at random
moments, and a KV cache so small, half of the time filled so blindly, that requests are preempted.
The scheduler's books are checked as it goes; at the end all slots and pages must be free, and the
memory of process and GPU as after the first quarter of the steps, but for 1 %.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from blind import ForecastNowAndThen
from gpu_memory import GpuMemory
from nanoflow.bench import environment
from nanoflow.config import make_args
from nanoflow.processor import Processor
from nanoflow.request import Request
from nanoflow.runtime import Runtime, start_runtime
from nanoflow.sampling_params import SamplingParams
from nanoflow.scheduler.stats import StepStats
from shapes import SHAPES, write_model

MAX_MODEL_LEN = 512
LIMITS = {"max_num_seqs": 64, "max_num_batched_tokens": 256, "block_size": 16}
NUM_PAGES = 256  # of 16 tokens: 64 each for 64 requests
OPEN_REQUESTS = 96
ABORT_SHARE = 0.02  # of the requests
CHECK_EVERY = 200  # steps
READ_EVERY = 0.01  # of the steps
WARM_UP = 0.25  # of the steps
MOST_DRIFT = 0.01
PATIENCE = 10  # times the steps, until requests have been preempted and aborted


class SoakError(RuntimeError):
    """Something leaked, or was not tried."""


@dataclass(frozen=True)
class Reading:
    step: int
    process: int  # bytes in use
    gpu: int | None


@dataclass
class Watch:
    """Listens to the steps in the scheduler's thread: checks its books and reads the memory."""

    runtime: Runtime
    gpu: GpuMemory | None
    read_every: int  # steps
    readings: list[Reading] = field(default_factory=list)
    last_step: int = 0

    def __call__(self, stats: StepStats) -> None:
        self.last_step = stats.step
        if stats.step % CHECK_EVERY == 0:
            self.runtime.state.check_integrity()
        if stats.step % self.read_every == 0:
            gpu = self.gpu.used() if self.gpu else None
            self.readings.append(Reading(stats.step, resident_bytes(), gpu))


def resident_bytes() -> int:
    """Of this process; as Linux tells it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SoakError("/proc/self/status has no VmRSS")


class Requests:
    """Makes random requests and counts how they end."""

    def __init__(self, runtime: Runtime, seed: int) -> None:
        self.done: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self.open: dict[str, None] = {}  # ids, oldest first
        self.ends: dict[str, int] = {}
        self.preemptions = 0
        self._processor = Processor(runtime, seed)
        self._vocab_size = runtime.vocab_size
        self._rng = np.random.default_rng(seed)
        self._beginnings = self._rng.integers(0, self._vocab_size, (8, 64))
        self._number = 0

    def make(self, count: int) -> list[Request]:
        numbers = range(self._number, self._number + count)
        self._number += count
        make = self._processor.make_requests
        made = [
            request
            for n in numbers
            for request in make(n, self._prompt(), self._params(), self.done.put)
        ]
        self.open |= {request.id: None for request in made}
        return made

    def take_finished(self, timeout: float) -> int:
        """Waits for the next and takes all that have finished. Raises SoakError on a failed one."""
        taken = 0
        try:
            while True:
                request = self.done.get(timeout=0 if taken else timeout)
                if request.finish_reason not in ("stop", "length", "abort"):
                    raise SoakError(f"request {request.id} failed") from request.error
                wanted = len(request.output_token_ids) if request.sampling.logprobs >= 0 else 0
                if len(request.logprobs) != wanted:
                    raise SoakError(f"{len(request.logprobs)} logprobs of {wanted} tokens")
                if request.finish_reason != "abort" and request.scores_prompt:
                    raise SoakError(f"request {request.id} lacks logprobs of its prompt")
                del self.open[request.id]
                self.ends[request.finish_reason] = self.ends.get(request.finish_reason, 0) + 1
                self.preemptions += request.num_preemptions
                taken += 1
        except queue.Empty:
            return taken

    def tried_all(self) -> bool:
        """Whether some that have finished were preempted, and some aborted."""
        return self.preemptions > 0 and "abort" in self.ends

    def to_abort(self, finished: int) -> list[str]:
        """A few of the open ones, in proportion to those that have finished."""
        count = self._rng.binomial(finished, ABORT_SHARE)
        return [str(name) for name in self._rng.choice(list(self.open), count, replace=False)]

    def _prompt(self) -> Sequence[int]:
        rng = self._rng
        length = int(min(rng.lognormal(3.5, 1.0) + 1, MAX_MODEL_LEN - 200))
        prompt = rng.integers(0, self._vocab_size, length)
        if rng.random() < 0.3:
            shared = self._beginnings[rng.integers(len(self._beginnings))][:length]
            prompt[: len(shared)] = shared
        return prompt.tolist()

    def _params(self) -> SamplingParams:
        """Few outputs are long, so that the scheduler cannot foresee what it will have to hold."""
        rng = self._rng
        max_tokens = int(min(rng.pareto(1.2) * 8 + 1, 190))
        return SamplingParams(
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_p=float(rng.choice([1.0, 0.9])),
            top_k=int(rng.choice([0, 1, 40])),
            prompt_logprobs=2 if rng.random() < 0.05 else None,
            logit_bias={int(t): 2.0 for t in rng.integers(0, 100, 9)} if rng.random() < 0.2 else {},
            allowed_token_ids=list(range(90)) if rng.random() < 0.2 else None,
            min_p=float(rng.choice([0.0, 0.05])),
            seed=int(rng.integers(1 << 31)) if rng.random() < 0.5 else None,
            stop_token_ids=rng.integers(0, self._vocab_size, 3).tolist(),
            ignore_eos=bool(rng.random() < 0.3),
            max_tokens=max_tokens,
            min_tokens=int(rng.integers(max_tokens + 1)) if rng.random() < 0.2 else 0,
            presence_penalty=float(rng.choice([0.0, 0.0, 1.5])),
            repetition_penalty=float(rng.choice([1.0, 1.0, 1.2])),
            logprobs=int(rng.integers(21)) if rng.random() < 0.1 else None,
            detokenize=False,
        )


def start(options: argparse.Namespace) -> Watch:
    gpu = GpuMemory(options.device) if options.device.startswith("cuda") else None
    with tempfile.TemporaryDirectory() as folder:
        runtime = start_runtime(
            make_args(
                {
                    "model": write_model(Path(folder), options.model, num_hidden_layers=2),
                    "load_format": "dummy",
                    "skip_tokenizer_init": True,
                    "device": options.device,
                    "schedule": options.schedule,
                    "seed": options.seed,
                    "max_model_len": MAX_MODEL_LEN,
                    "num_gpu_blocks_override": NUM_PAGES,
                    **LIMITS,
                }
            )
        )
    runtime.state.admission.forecast = ForecastNowAndThen()
    watch = Watch(runtime, gpu, max(1, round(options.steps * READ_EVERY)))
    runtime.loop.step_listener = watch
    return watch


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What happened. Raises SoakError."""
    watch = start(options)
    runtime = watch.runtime
    requests = Requests(runtime, options.seed)
    begin = told = perf_counter()
    try:
        runtime.loop.submit(requests.make(OPEN_REQUESTS))
        while watch.last_step < options.steps * (1 if requests.tried_all() else PATIENCE):
            finished = requests.take_finished(timeout=60)
            if finished == 0:
                raise SoakError(f"no request finished in 60 s, after {watch.last_step} steps")
            runtime.loop.abort(requests.to_abort(finished))
            runtime.loop.submit(requests.make(OPEN_REQUESTS - len(requests.open)))
            if perf_counter() - told > 5:
                told = perf_counter()
                print(progress(watch, requests, told - begin), flush=True)
        if not requests.tried_all():
            raise SoakError(
                f"{watch.last_step} steps saw {requests.preemptions} preemptions and "
                f"{requests.ends.get('abort', 0)} aborts; both must happen: run more"
            )
    finally:
        runtime.loop.close()
    seconds = perf_counter() - begin
    print(progress(watch, requests, seconds))
    requests.take_finished(timeout=0)
    check_all_is_free(runtime, watch.last_step)
    return {
        "steps": watch.last_step,
        "seconds": seconds,
        "requests": sum(requests.ends.values()),
        "ends": requests.ends,
        "preemptions": requests.preemptions,
        "device": runtime.device,
        "process_bytes": drift("process", watch, [r.process for r in watch.readings]),
        "gpu_bytes": drift("GPU", watch, [r.gpu for r in watch.readings if r.gpu is not None]),
        "gpu_bytes_are": watch.gpu.source if watch.gpu else None,
    }


def progress(watch: Watch, requests: Requests, seconds: float) -> str:
    last = watch.readings[-1] if watch.readings else Reading(0, resident_bytes(), None)
    memory = "" if last.gpu is None else f", GPU {last.gpu / 1e6:.1f} MB"
    return (
        f"{watch.last_step} steps, {watch.last_step / seconds:.0f} a second: "
        f"{sum(requests.ends.values())} requests, {requests.ends.get('abort', 0)} aborted, "
        f"{requests.preemptions} preemptions, process {last.process / 1e6:.1f} MB{memory}"
    )


def check_all_is_free(runtime: Runtime, last_step: int) -> None:
    """Raises SoakError; the loop is closed."""
    state = runtime.state
    state.reclaim(last_step)
    state.check_integrity()
    held = state.pages.num_pages - state.pages.num_free
    if state.has_requests or held or len(state.slots.running):
        raise SoakError(f"{held} pages and {len(state.slots.running)} slots are held by nobody")


def drift(what: str, watch: Watch, used: list[int]) -> dict[str, Any] | None:
    """Memory after the first quarter of the steps and most of it since; None of no readings.

    Raises SoakError when it has grown by more than MOST_DRIFT.
    """
    if not used:
        return None
    begin = int(len(used) * WARM_UP)
    first, most = used[begin], max(used[begin:])
    if most > first + MOST_DRIFT * abs(first):
        raise SoakError(
            f"memory of the {what} grew from {first} bytes after {watch.readings[begin].step} "
            f"steps to {most}"
        )
    return {"after_warm_up": first, "most": most, "last": used[-1]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b", help="of two layers")
    parser.add_argument("--steps", type=int, default=100_000, help="at least")
    parser.add_argument("--schedule", default="sequential")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--commit", help="what is tested, where git cannot say")
    options = parser.parse_args(arguments)
    try:
        found = run(options)
    except SoakError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    found |= {"benchmark": "soak", **environment.origin(options.commit)}
    if options.output_json is not None:
        options.output_json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
