"""How well admission fills the KV cache, and how often its predictions fail, in a simulation.

Usage: python bench/admission.py [--workloads 512/512 512/1024 chat] [--output-json FILE]

Each workload runs with the forecast, and with vLLM's rule beside it: whoever's prompt fits into the
pages that are free now begins, up to --max-num-seqs, which is 1,024 there on a large GPU. (A little
less: vLLM asks for the pages of the prompt's first chunk only. Who gives way is chosen as here.)

The scheduler is the real one; the engine is a clock that answers at once. A step takes as long as
a roofline says for Llama-3.1-8B on one H100: products at 700 TFLOP/s, or the weights read once, and
then the KV cache read at 3 TB/s.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from time import perf_counter

import numpy as np

from blind import AdmitWhatFits
from nanoflow.bench import environment
from nanoflow.ordering import ORDERS, order_prompts
from nanoflow.request import Request, Sampling
from nanoflow.scheduler.deal import Dealer
from nanoflow.scheduler.pages import PageAllocator
from nanoflow.scheduler.policy import Policy
from nanoflow.scheduler.slots import Ints, Slots
from nanoflow.scheduler.state import SchedulerState
from nanoflow.scheduler.step import Step

PAGE_SIZE = 64
EOS = 1
PARAMETERS, KV_BYTES_PER_TOKEN = 8.0e9, 131_072
FLOPS, BYTES_PER_SECOND = 700e12, 3.0e12
MAX_TOKENS = 2048  # of requests whose length is not known
SEED = 0
FULL = 0.95  # of the pages; the steady state begins with it
ADMISSIONS = ("forecast", "vllm")


@dataclass(frozen=True)
class Workload:
    """Tokens of prompts and outputs; `is_certain` when the scheduler knows the latter."""

    prompts: np.ndarray
    outputs: np.ndarray
    is_certain: bool


@dataclass(frozen=True)
class Result:
    """What complete_step() reads of a step's result."""

    tokens: np.ndarray
    logprobs: None = None


@dataclass
class Row:
    """One run. The steady state is what lies between the first step behind the first end that has
    FULL of the pages (the first end, if none has), and the last admission."""

    workload: str
    admission: str
    order: str
    requests: int
    steps: int
    simulated_seconds: float
    total_tokens_per_second: float  # prompts and outputs, over the whole run
    overlapped_tokens_per_second: float  # the same, if products and reads ran at the same time
    recomputed_tokens: int  # after preemptions
    steady_from: int  # step
    steady_steps: int
    steady_pages_granted: float  # share of all, mean
    steady_running: float  # mean
    steady_rows: float  # mean
    steady_rows_deviation: float  # standard
    steady_longest_segment: float  # rows of each step's, over those of its mean one, mean
    preempted: float  # share of requests that gave way at least once
    preemptions: int
    predicted_peak: float  # share of pages, by the forecast for those running, mean in steady state
    expected_tokens: float  # a request, by the forecast when it began, mean
    actual_tokens: float
    forecast_error_tokens: float  # mean of the differences, whatever their signs
    scheduler_ms: float  # mean of a step


def make_workload(name: str, count: int) -> Workload:
    """`P/D`: as many of each, known to the scheduler. `P/D:eos`: the same lengths, not known.
    `blocks`: half of them 2048/64, then half 128/1024; `mixed`: the same, shuffled.
    `chat`: log-normal lengths about those of ShareGPT (mean 246 and 322), not known.
    `spread`: the same about means of 512 and 1024."""
    rng = np.random.default_rng(SEED)
    if name == "chat":
        prompts = rng.lognormal(np.log(130), 1.1, count).clip(1, 2048)
        outputs = rng.lognormal(np.log(230), 0.8, count).clip(1, 2048)
        return Workload(prompts.astype(np.int64), outputs.astype(np.int64), False)
    if name == "spread":
        prompts = rng.lognormal(np.log(512) - 0.5, 1.0, count).clip(1, 2000)
        outputs = rng.lognormal(np.log(1024) - 0.32, 0.8, count).clip(1, 2048)
        return Workload(prompts.astype(np.int64), outputs.astype(np.int64), False)
    if name in ("blocks", "mixed"):
        is_long = np.arange(count) < count // 2
        if name == "mixed":
            rng.shuffle(is_long)
        return Workload(np.where(is_long, 2048, 128), np.where(is_long, 64, 1024), True)
    lengths, _, kind = name.partition(":")
    prompt, output = map(int, lengths.split("/"))
    return Workload(np.full(count, prompt), np.full(count, output), kind != "eos")


def make_requests(workload: Workload) -> Iterable[Request]:
    rng = np.random.default_rng(SEED)
    for number, (prompt, output) in enumerate(
        zip(workload.prompts.tolist(), workload.outputs.tolist(), strict=True)
    ):
        certain = workload.is_certain
        sampling = Sampling(1.0, 1.0, 0, 0.0, number, 0, (), (EOS,), ignore_eos=certain)
        max_len = prompt + (output if certain else MAX_TOKENS)
        tokens = rng.integers(2, 1000, prompt, dtype=np.int32)
        yield Request(str(number), tokens, sampling, max_len, lambda request: None)


class Simulation:
    def __init__(
        self, workload: Workload, options: argparse.Namespace, admission: str = ADMISSIONS[0]
    ) -> None:
        self.workload = workload
        self.slots = Slots(options.max_num_seqs, 4096, PAGE_SIZE)
        self.num_pages = options.kv_tokens // PAGE_SIZE
        self.state = SchedulerState(
            Policy(Dealer(options.cuts, options.max_num_seqs), options.max_num_batched_tokens),
            self.slots,
            PageAllocator(self.num_pages),
            shares_prefixes=False,
        )
        if admission == "vllm":
            self.state.admission = AdmitWhatFits(self.num_pages, options.max_num_seqs, PAGE_SIZE)
        self.order = options.order
        self.rows: list[Ints] = []  # of each segment of each step
        self.overlapped_seconds = 0.0
        self.seconds = self.scheduler_seconds = 0.0
        self.held: list[int] = []
        self.running: list[int] = []
        self.peaks: list[float] = []
        self.waiting: list[int] = []

    def run(self) -> None:
        in_flight: list[Step] = []
        requests = list(make_requests(self.workload))
        order = range(len(requests))
        if self.order == "auto":
            order = order_prompts([[request] for request in requests])
        for index in order:
            self.state.add(requests[index])
        while self.state.has_requests or in_flight:
            begin = perf_counter()
            self.state.reclaim(self.state.arrived_step)
            step = self.state.start_step()
            self.scheduler_seconds += perf_counter() - begin
            if not step.plan.is_empty:
                in_flight.append(step)
            if in_flight and (len(in_flight) == 2 or step.plan.is_empty):
                self.complete(in_flight.pop(0))
        self.preempted = sum(request.num_preemptions > 0 for request in requests)

    def complete(self, step: Step) -> None:
        slots = self.slots
        sampled = step.plan.slots[step.samples]
        numbers = np.array([int(slots.request(slot).id) for slot in sampled.tolist()], np.int64)
        generated = slots.known[sampled] - slots.prompt_len[sampled] + 1
        is_last = generated >= self.workload.outputs[numbers]
        products, read = self.durations(step)
        self.seconds += products + read
        self.overlapped_seconds += max(products, read)
        begin = perf_counter()
        tokens = np.where(is_last, EOS, 5).astype(np.int32)
        self.state.complete_step(step, Result(tokens), self.seconds)
        self.scheduler_seconds += perf_counter() - begin
        self.held.append(self.num_pages - self.state.pages.num_free)
        self.running.append(self.state.num_running)
        self.waiting.append(self.state.num_waiting)
        outlook = self.state.admission.forecast.outlook(slots, slots.running)
        self.peaks.append(outlook.peak() / self.num_pages)

    def durations(self, step: Step) -> tuple[float, float]:
        """Seconds of matrix products, and of reading the KV cache."""
        before = np.append(0, np.cumsum(step.plan.rows))
        self.rows.append(np.diff(before[step.plan.segment_requests]))
        rows = int(self.rows[-1].sum())
        products = max(2 * PARAMETERS * rows / FLOPS, 2 * PARAMETERS / BYTES_PER_SECOND)
        read = int(self.slots.computed[step.plan.slots].sum()) * KV_BYTES_PER_TOKEN
        return products, read / BYTES_PER_SECOND


def measure(name: str, options: argparse.Namespace, admission: str = ADMISSIONS[0]) -> Row:
    workload = make_workload(name, options.num_prompts)
    run = Simulation(workload, options, admission)
    run.run()
    counters = run.state.counters
    steps = len(run.held)
    first_end = int(workload.outputs.min())
    last_admission = int(np.argmin(np.array(run.waiting) > 0))
    is_full = np.array(run.held[first_end:last_admission]) >= FULL * run.num_pages
    steady_from = first_end + int(np.argmax(is_full))
    steady = slice(steady_from, last_admission)
    rows = np.array(run.rows)
    steady_rows = rows[steady].sum(1)
    tokens = int(workload.prompts.sum() + workload.outputs.sum())
    # The last token is computed by no step where it is known to be the last.
    num_known_ends = int(np.sum(workload.is_certain | (workload.outputs == MAX_TOKENS)))
    return Row(
        workload=name,
        admission=admission,
        order=options.order,
        requests=options.num_prompts,
        steps=steps,
        simulated_seconds=run.seconds,
        total_tokens_per_second=tokens / run.seconds,
        overlapped_tokens_per_second=tokens / run.overlapped_seconds,
        recomputed_tokens=int(rows.sum()) - tokens + num_known_ends,
        steady_from=steady_from,
        steady_steps=len(run.held[steady]),
        steady_pages_granted=float(np.mean(run.held[steady])) / run.num_pages,
        steady_running=float(np.mean(run.running[steady])),
        steady_rows=float(np.mean(steady_rows)),
        steady_rows_deviation=float(np.std(steady_rows)),
        steady_longest_segment=float(np.mean(rows[steady].max(1) / rows[steady].mean(1))),
        preempted=run.preempted / options.num_prompts,
        preemptions=counters.preemptions,
        predicted_peak=float(np.mean(run.peaks[steady])),
        expected_tokens=counters.forecast.expected / options.num_prompts,
        actual_tokens=counters.forecast.actual / options.num_prompts,
        forecast_error_tokens=counters.forecast.error / options.num_prompts,
        scheduler_ms=run.scheduler_seconds / steps * 1e3,
    )


def describe(row: Row) -> str:
    return (
        f"{row.workload:>12}, {row.admission:>8}: {row.steps} steps, "
        f"{row.total_tokens_per_second:.0f} tokens/s "
        f"({row.overlapped_tokens_per_second:.0f} overlapped), "
        f"steady: {row.steady_pages_granted:.1%} of pages, {row.steady_running:.0f} running; "
        f"{row.steady_rows:.0f} rows +-{row.steady_rows_deviation:.0f}, the longest segment "
        f"{row.steady_longest_segment:.2f} of the mean; "
        f"preempted {row.preempted:.2%}, {row.recomputed_tokens:,} tokens recomputed; "
        f"predicted peak {row.predicted_peak:.1%}, "
        f"tokens {row.expected_tokens:.0f} for {row.actual_tokens:.0f} "
        f"(+-{row.forecast_error_tokens:.0f}); {row.scheduler_ms:.2f} ms a step"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=[
            *("512/512", "512/1024", "1024/512", "512/512:eos", "512/1024:eos"),
            *("chat", "spread", "blocks", "mixed"),
        ],
        help="P/D, P/D:eos, chat, spread, blocks or mixed",
    )
    parser.add_argument("--order", choices=ORDERS, default="fcfs", help="in which they begin")
    parser.add_argument("--num-prompts", type=int, default=4000)
    parser.add_argument("--kv-tokens", type=int, default=464_896)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--cuts", nargs="*", type=float, default=[0.5], help="of segments")
    parser.add_argument("--admissions", nargs="+", choices=ADMISSIONS, default=ADMISSIONS)
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    rows = []
    for name, admission in product(options.workloads, options.admissions):
        row = measure(name, options, admission)
        rows.append(row)
        print(describe(row), flush=True)
    if options.output_json is not None:
        report = {
            "benchmark": "admission",
            **environment.origin(options.commit),
            "device": environment.cpu_model(),
            "seed": SEED,
            "model": "roofline of Llama-3.1-8B on one H100: 700 TFLOP/s, 3 TB/s; nothing was run",
            "kv_tokens": options.kv_tokens,
            "cuts": options.cuts,
            "results": [asdict(row) for row in rows],
        }
        options.output_json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
