"""Measures the steady state alone: fills the batch with requests in the midst of their lives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from nanoflow.bench.datasets import Request
from nanoflow.bench.gpu_profile import Profile, ProfileError, Profiler
from nanoflow.bench.steady import SteadyState, window
from nanoflow.bench.throughput import Generator, sampling_params
from nanoflow.scheduler.stats import StepStats

SETTLE_SECONDS = 2.0  # between the last prefill of the fill and the window
PROFILE_STEPS = 40


@dataclass(frozen=True, slots=True)
class SteadyMeasurement:
    state: SteadyState
    begin: float  # of the window, in seconds of time.perf_counter
    fill_seconds: float
    fill_requests: int
    mean_running: float
    profile: Profile | None
    profile_reason: str | None  # why there is no profile


class StepLog:
    """The steps of a run as they complete, for threads that wait for them."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self._prefilled = 0
        self._has_ended = False
        self._changed = threading.Condition()

    def __call__(self, stats: StepStats) -> None:
        with self._changed:
            self.steps.append(stats)
            self._prefilled += stats.prefill_tokens
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def wait_for_prefill(self, tokens: int) -> None:
        self._wait(lambda: self._prefilled >= tokens)

    def wait_for_steps(self, count: int) -> None:
        """So many more."""
        target = len(self.steps) + count
        self._wait(lambda: len(self.steps) >= target)

    def wait_for_time(self, time: float) -> None:
        """Until a step has completed at that time of time.perf_counter."""
        self._wait(lambda: bool(self.steps) and self.steps[-1].time_done >= time)

    def _wait(self, is_there: Callable[[], bool]) -> None:
        """Raises ValueError when the run ends, or has nobody waiting: it is steady no more."""
        with self._changed:
            self._changed.wait_for(lambda: is_there() or self._has_ended or self._is_short())
            if not is_there():
                raise ValueError(
                    f"after {len(self.steps)} steps no request waited any more: the measurement "
                    "needs more, raise --num-prompts"
                )

    def _is_short(self) -> bool:
        return bool(self.steps) and self.steps[-1].waiting == 0


def measure_steady(
    llm: Generator,
    fill: Sequence[Request],
    stream: Sequence[Request],
    *,
    seconds: float,
    settle_seconds: float = SETTLE_SECONDS,
    temperature: float,
    detokenize: bool,
    seed: int,
    profiler: Profiler | None = None,
) -> SteadyMeasurement:
    """Gives `fill` and behind it `stream` to the LLM and measures `seconds` once the fill has been
    prefilled; then ends all requests. Nothing waits for the stream's end, so it may be long.

    Raises ValueError when the stream or the window was too short.
    """
    requests = [*fill, *stream]
    prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
    params = sampling_params(requests, temperature=temperature, detokenize=detokenize, seed=seed)
    mean_input = sum(len(request.prompt_token_ids) for request in stream) / len(stream)
    mean_output = sum(request.output_len for request in stream) / len(stream)
    log = StepLog()
    failures: list[BaseException] = []

    def generate() -> None:
        try:
            llm.generate(prompts, params, use_tqdm=False)
        except BaseException as error:
            failures.append(error)
        finally:
            log.end()

    profile: Profile | None = None
    reason: str | None = "not asked for"
    llm.step_listener = log
    thread = threading.Thread(target=generate, name="steady-state")
    started = perf_counter()
    thread.start()
    try:
        log.wait_for_prefill(sum(len(request.prompt_token_ids) for request in fill))
        filled = perf_counter()
        log.wait_for_time(filled + settle_seconds)
        begin = len(log.steps) - 1
        log.wait_for_time(log.steps[begin].time_done + seconds)
        end = len(log.steps) - 1
        if profiler is not None:
            profile, reason = _profile(profiler, log)
    finally:
        llm.abort()
        thread.join()
        llm.step_listener = None
        if failures:
            raise failures[0]
    steps = log.steps
    state = window(steps, begin, end, mean_input, mean_output)
    if state is None:
        raise ValueError(f"no token was generated in {seconds} s: raise --steady-seconds")
    return SteadyMeasurement(
        state=state,
        begin=steps[begin].time_done,
        fill_seconds=filled - started,
        fill_requests=len(fill),
        mean_running=sum(step.running for step in steps[begin + 1 : end + 1]) / state.steps,
        profile=profile,
        profile_reason=reason,
    )


def _profile(profiler: Profiler, log: StepLog) -> tuple[Profile | None, str | None]:
    """Twice, as the first time prepares the GPU's tracing; the profile, or why there is none."""

    def wait() -> float:
        log.wait_for_steps(1)
        first = log.steps[-1]
        log.wait_for_steps(PROFILE_STEPS)
        last = log.steps[-1]
        return (last.time_done - first.time_done) / (last.step - first.step) * 1e3

    try:
        profiler.record(wait)
        return profiler.record(wait), None
    except ProfileError as error:
        return None, str(error)
