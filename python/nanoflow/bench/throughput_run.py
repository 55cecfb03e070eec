"""One run of the throughput command, from the LLM's start to its result."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from nanoflow.bench import result, throughput
from nanoflow.bench.datasets import Lengths, Request, random_requests
from nanoflow.bench.fill import fill_lengths, running_requests
from nanoflow.bench.gpu_profile import ProfileError, Profiler
from nanoflow.bench.steady_run import SETTLE_SECONDS, SteadyMeasurement, measure_steady
from nanoflow.bench.telemetry import Telemetry
from nanoflow.bench.workload import Target, Workload
from nanoflow.llm import LLM
from nanoflow.metrics import Counter


@dataclass(frozen=True, slots=True)
class _Outcome:
    rates: dict[str, Any]  # of the result
    kernels: dict[str, Any]  # of the result
    text: list[str]
    begin: float  # of what was measured, in seconds of time.perf_counter
    seconds: float
    tokens_per_second: float  # what power is divided by
    phases: dict[str, float]


def measure_workload(
    options: argparse.Namespace, workload: Workload, arguments: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The result, and lines to print of it. `arguments` are the LLM's.

    Raises ValueError when the workload does not fit the LLM, or does not last.
    """
    device = str(arguments.get("device", "auto"))
    profiler, no_profile = _profiler(options, device)
    begin = perf_counter()
    with Telemetry(device) as telemetry, LLM(**arguments) as llm:
        phases = {"load": perf_counter() - begin}
        runner = _Runner(llm, options)
        requests = runner.draw(workload, workload.num_prompts)
        if options.num_warmups > 0:
            few = runner.draw(workload, options.num_warmups)
            phases["warm_up"] = runner.whole(few).seconds
        if options.steady_start:
            done = runner.steady(requests, profiler, no_profile)
        else:
            done = runner.whole(requests)
        power = telemetry.power(done.begin, done.begin + done.seconds)
        found = {
            **result.circumstances(
                llm.args, llm.limits, llm.memory, llm.device_description, options.commit
            ),
            "steps_by_schedule": _steps_by_schedule(llm),
            "workload": workload.name,
            "dataset": options.dataset_name,
            "temperature": options.temperature,
            "n": options.n,
            "detokenize": not options.disable_detokenize,
            "warm_up": _warm_up(options),
            **done.rates,
            **telemetry.board,
            "total_tok_s_per_gpu": done.tokens_per_second / llm.args.ranks,
            # One device is sampled: its share of the tokens is what its power is divided by.
            **result.energy(power, telemetry.reason, done.tokens_per_second / llm.args.ranks),
            "gemm_ceiling_tflops": None,
            **done.kernels,
            "phase_seconds": phases | done.phases,
        }
    return found, [*done.text, llm.memory.table()]


def target_of(llm: LLM) -> Target:
    tokenizer = None if llm.args.skip_tokenizer_init else llm.get_tokenizer()
    return Target(llm.limits.max_model_len, llm.vocab_size, tokenizer)


class _Runner:
    """Draws requests and runs them."""

    def __init__(self, llm: LLM, options: argparse.Namespace) -> None:
        self._llm = llm
        self._target = target_of(llm)
        self._rng = np.random.default_rng(llm.args.seed)
        self._n: int = options.n
        self._steady_seconds: float = options.steady_seconds
        self._order: str = options.order
        self._how: dict[str, Any] = {
            "temperature": options.temperature,
            "detokenize": not options.disable_detokenize,
            "seed": llm.args.seed,
        }

    def draw(self, workload: Workload, count: int) -> list[Request]:
        return workload.draw(count, self._target, self._rng)

    def whole(self, requests: list[Request]) -> _Outcome:
        run = throughput.measure(self._llm, requests, n=self._n, order=self._order, **self._how)
        return _Outcome(
            rates=throughput.to_json(run),
            kernels=result.kernels(None, "only with --steady-start"),
            text=throughput.lines(run),
            begin=run.begin,
            seconds=run.seconds,
            tokens_per_second=run.total_tokens / run.seconds,
            phases={"run": run.seconds},
        )

    def steady(
        self, requests: list[Request], profiler: Profiler | None, no_profile: str | None
    ) -> _Outcome:
        limits = self._llm.limits
        lengths = [Lengths(len(one.prompt_token_ids), one.output_len) for one in requests]
        count = running_requests(lengths, limits)
        fill = fill_lengths(lengths, count, limits.max_num_batched_tokens, self._rng)
        run = measure_steady(
            self._llm,
            random_requests(fill, self._target.vocab_size, self._target.special_ids, self._rng),
            requests,
            seconds=self._steady_seconds,
            profiler=profiler,
            **self._how,
        )
        return _Outcome(
            rates=_rates(run)
            | {
                "matrix_tflops": result.matrix_tflops(self._llm.model_config, run.state)
                / self._llm.args.ranks
            },
            kernels=result.kernels(run.profile, no_profile or run.profile_reason),
            text=[throughput.steady_line(run.state)],
            begin=run.begin,
            seconds=run.state.seconds,
            tokens_per_second=run.state.tokens_per_second,
            phases={"fill": run.fill_seconds, "window": run.state.seconds},
        )


def _profiler(options: argparse.Namespace, device: str) -> tuple[Profiler | None, str | None]:
    """A profiler, or why there is none."""
    if not options.profile or not options.steady_start:
        return None, "not asked for"
    if not device.startswith("cuda"):
        return None, "only GPUs are profiled"
    try:
        return Profiler(), None
    except ProfileError as error:
        return None, str(error)


def _steps_by_schedule(llm: LLM) -> dict[str, float]:
    """Where schedules were chosen from; whole run, trials included."""
    return {
        metric.labels["schedule"]: metric.value
        for metric in llm.get_metrics()
        if isinstance(metric, Counter) and metric.name == "nanoflow:steps"
    }


def _warm_up(options: argparse.Namespace) -> str:
    text = (
        f"{options.num_warmups} requests of the same kind, not counted"
        if options.num_warmups
        else "none; loading is not counted"
    )
    if options.steady_start:
        text += f"; then a full batch of evenly spread progress and {SETTLE_SECONDS:g} s"
    return text


def _rates(run: SteadyMeasurement) -> dict[str, Any]:
    state = run.state
    return {
        "measured": "steady state",
        "total_tok_s": state.counted_per_second,
        "output_tok_s": state.output_per_second,
        "steady_total_tok_s": state.tokens_per_second,
        "step_ms": state.step_ms,
        "steady_state": {
            **state.to_json(),
            "fill_requests": run.fill_requests,
            "mean_running": run.mean_running,
        },
    }
