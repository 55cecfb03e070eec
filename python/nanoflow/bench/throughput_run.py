"""One run of the throughput command, from the LLM's start to its results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from time import perf_counter
from typing import Any

import numpy as np

from nanoflow._core import Schedule
from nanoflow.bench import result, throughput
from nanoflow.bench.async_batch import AsyncBatch
from nanoflow.bench.datasets import Lengths, Request, random_requests
from nanoflow.bench.fill import fill_lengths, running_requests
from nanoflow.bench.gpu_profile import Profile, ProfileError, Profiler
from nanoflow.bench.steady_run import SETTLE_SECONDS, SteadyBatch, SteadyMeasurement
from nanoflow.bench.telemetry import Telemetry
from nanoflow.bench.workload import Target, Workload
from nanoflow.config import EngineArgs
from nanoflow.llm import LLM
from nanoflow.metrics import counted_by
from nanoflow.schedule import AUTO

ROUNDS = 3  # in which several schedules take turns


@dataclass(frozen=True, slots=True)
class _Outcome:
    rates: dict[str, Any]  # of the result
    kernels: dict[str, Any]  # of the result
    text: list[str]
    spans: Sequence[tuple[float, float]]  # that were measured, in seconds of time.perf_counter
    tokens_per_second: float  # what power is divided by
    phases: dict[str, float]


def measure_workload(
    options: argparse.Namespace,
    workload: Workload,
    arguments: dict[str, Any],
    schedules: Sequence[Schedule | str] = (),
) -> list[tuple[dict[str, Any], list[str]]]:
    """A result, and lines to print of it. `arguments` are the LLM's.

    With `schedules`, one for each of them: they take turns on one engine, in the steady state of
    one batch or for the same requests over again. The first may be "auto".

    Raises ValueError when the workload does not fit the LLM, or does not last.
    """
    device = str(arguments.get("device", "auto"))
    profiler, no_profile = _profiler(options, device)
    if schedules:
        arguments = arguments | {"schedule": _first(schedules)}
    begin = perf_counter()
    with (
        (AsyncBatch if options.async_engine else LLM)(**arguments) as llm,
        Telemetry(llm.memory.device, llm.args.tensor_parallel_size) as telemetry,
    ):
        phases = {"load": perf_counter() - begin}
        say(f"loaded in {phases['load']:.1f} s")
        turns: Sequence[Schedule | str | None] = schedules or [None]
        runner = _Runner(llm, options, turns)
        requests = runner.draw(workload, workload.num_prompts)
        if options.num_warmups > 0:
            few = runner.draw(workload, options.num_warmups)
            phases["warm_up"] = runner.whole(few).phases["run"]
        if options.steady_start:
            outcomes = runner.steady(requests, profiler, no_profile)
        else:
            outcomes = runner.wholes(requests)
        circumstances = result.circumstances(
            llm.args, llm.limits, llm.memory, llm.device_description, options.commit
        )
        results = []
        for schedule, done in zip(turns, outcomes, strict=True):
            power = telemetry.mean_power(done.spans)
            found = {
                **circumstances,
                **({} if schedule is None else {"schedule": _name(schedule)}),
                "steps_by_schedule": _steps_by_schedule(llm),
                "workload": workload.name,
                **_manner(options),
                **done.rates,
                **telemetry.board,
                "total_tok_s_per_gpu": done.tokens_per_second / llm.args.ranks,
                **result.energy(power, telemetry.reason, _sampled_rate(llm.args, done)),
                "gemm_ceiling_tflops": None,
                **done.kernels,
                "phase_seconds": phases | done.phases,
            }
            results.append((found, [*done.text, llm.memory.table()]))
    return results


def _manner(options: argparse.Namespace) -> dict[str, Any]:
    """How the workload is run."""
    return {
        "dataset": options.dataset_name,
        "front": "AsyncLLM" if options.async_engine else "LLM",
        "prequeue_requests": not options.async_engine,  # an LLM queues all of a batch at once
        "temperature": options.temperature,
        "n": options.n,
        "detokenize": not options.disable_detokenize,
        "warm_up": _warm_up(options),
    }


def _first(schedules: Sequence[Schedule | str]) -> Schedule | str:
    """What the LLM starts with; weights are laid out for it."""
    if schedules[0] == AUTO:
        return AUTO
    return max(schedules, key=lambda one: isinstance(one, Schedule) and one.gathers)


def _name(schedule: Schedule | str) -> str:
    return schedule.id if isinstance(schedule, Schedule) else schedule


def say(text: str) -> None:
    """A line of progress, with the time of day."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def _sampled_rate(args: EngineArgs, done: _Outcome) -> float:
    """Tokens per second that the sampled boards account for: all of them, but a lone rank of
    simulated ones its share."""
    return done.tokens_per_second * args.tensor_parallel_size / args.ranks


def target_of(llm: LLM | AsyncBatch) -> Target:
    tokenizer = None if llm.args.skip_tokenizer_init else llm.get_tokenizer()
    return Target(llm.limits.max_model_len, llm.vocab_size, tokenizer)


class _Runner:
    """Draws requests and runs them."""

    def __init__(
        self,
        llm: LLM | AsyncBatch,
        options: argparse.Namespace,
        schedules: Sequence[Schedule | str | None],
    ) -> None:
        """`schedules`: to run with; None for the LLM's own."""
        self._llm = llm
        self._schedules = schedules
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

    @property
    def _sync_llm(self) -> LLM:
        """For what an AsyncBatch does not do, and whose flags have been refused with it."""
        assert isinstance(self._llm, LLM)
        return self._llm

    def draw(self, workload: Workload, count: int) -> list[Request]:
        return workload.draw(count, self._target, self._rng)

    def wholes(self, requests: list[Request]) -> list[_Outcome]:
        outcomes = []
        for schedule in self._schedules:
            self._use(schedule)
            self._llm.reset_prefix_cache()
            outcomes.append(self.whole(requests))
        return outcomes

    def whole(self, requests: list[Request]) -> _Outcome:
        run = throughput.measure(self._llm, requests, n=self._n, order=self._order, **self._how)
        return _Outcome(
            rates=throughput.to_json(run),
            kernels=result.kernels(None, "only with --steady-start"),
            text=throughput.lines(run),
            spans=[(run.begin, run.begin + run.seconds)],
            tokens_per_second=run.total_tokens / run.seconds,
            phases={"run": run.seconds},
        )

    def steady(
        self, requests: list[Request], profiler: Profiler | None, no_profile: str | None
    ) -> list[_Outcome]:
        """Several schedules take turns, for the load is never quite the same. All are measured
        before any is profiled, which may slow down what follows."""
        limits = self._llm.limits
        lengths = [Lengths(len(one.prompt_token_ids), one.output_len) for one in requests]
        count = running_requests(lengths, limits)
        fill = fill_lengths(lengths, count, limits, self._rng)
        filling = random_requests(
            fill, self._target.vocab_size, self._target.special_ids, self._rng
        )
        rounds = ROUNDS if len(self._schedules) > 1 else 1
        windows: list[list[SteadyMeasurement]] = [[] for _ in self._schedules]
        profiles: list[tuple[Profile | None, str | None]]
        profiles = [(None, no_profile)] * len(self._schedules)
        with SteadyBatch(self._sync_llm, filling, requests, **self._how) as batch:
            say(f"{len(fill)} requests prefilled in {batch.fill_seconds:.1f} s")
            for turn in range(rounds):
                for schedule, mine in zip(self._schedules, windows, strict=True):
                    self._use(schedule)
                    if turn == 0 and self._is_choosing(schedule) and not batch.wait_for_choice():
                        say("schedules are still being tried")
                    mine.append(batch.measure(self._steady_seconds / rounds))
                    say(throughput.steady_line(mine[-1].state))
            runs = [SteadyMeasurement.together(mine) for mine in windows]
            if profiler is not None:
                profiles = [
                    self._profile(schedule, batch, profiler) for schedule in self._schedules
                ]
        return [
            self._outcome(run, batch, *profile) for run, profile in zip(runs, profiles, strict=True)
        ]

    def _profile(
        self, schedule: Schedule | str | None, batch: SteadyBatch, profiler: Profiler
    ) -> tuple[Profile | None, str | None]:
        self._use(schedule)
        return batch.profile(profiler)

    def _outcome(
        self, run: SteadyMeasurement, batch: SteadyBatch, profile: Profile | None, why: str | None
    ) -> _Outcome:
        tflops = result.matrix_tflops(self._sync_llm.model_config, run.state) / self._llm.args.ranks
        return _Outcome(
            rates=_rates(run, batch.fill_requests) | {"matrix_tflops": tflops},
            kernels=result.kernels(profile, why),
            text=[throughput.steady_line(run.state)],
            spans=run.spans,
            tokens_per_second=run.state.tokens_per_second,
            phases={"fill": batch.fill_seconds, "window": run.state.seconds},
        )

    def _is_choosing(self, schedule: Schedule | str | None) -> bool:
        """Whether there is something to try."""
        return schedule in (None, AUTO) and bool(_steps_by_schedule(self._llm))

    def _use(self, schedule: Schedule | str | None) -> None:
        if schedule is None:
            return
        say(f"schedule {_name(schedule)}")
        self._sync_llm.set_schedule(schedule)


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


def _steps_by_schedule(llm: LLM | AsyncBatch) -> dict[str, float]:
    """Where schedules were chosen from; whole run, trials included."""
    return counted_by("schedule", "nanoflow:steps", llm.get_metrics())


def _warm_up(options: argparse.Namespace) -> str:
    text = (
        f"{options.num_warmups} requests of the same kind, not counted"
        if options.num_warmups
        else "none; loading is not counted"
    )
    if options.steady_start:
        text += f"; then a full batch of evenly spread progress and {SETTLE_SECONDS:g} s"
    return text


def _rates(run: SteadyMeasurement, fill_requests: int) -> dict[str, Any]:
    state = run.state
    return {
        "measured": "steady state",
        "total_tok_s": state.counted_per_second,
        "output_tok_s": state.output_per_second,
        "steady_total_tok_s": state.tokens_per_second,
        "step_ms": state.step_ms,
        "steady_state": {
            **state.to_json(),
            "windows": [window.counts() for window in run.windows],
            "fill_requests": fill_requests,
            "mean_running": run.mean_running,
        },
    }
