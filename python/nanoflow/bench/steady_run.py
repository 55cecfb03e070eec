"""Measures the steady state alone: fills the batch with requests in the midst of their lives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from nanoflow.bench.datasets import Request
from nanoflow.bench.gpu_profile import Profile, ProfileError, Profiler
from nanoflow.bench.steady import SteadyState, together, window
from nanoflow.bench.throughput import sampling_params
from nanoflow.llm import LLM
from nanoflow.scheduler.stats import StepStats

SETTLE_SECONDS = 2.0  # between the last prefill of the fill and the window
CHOICE_SECONDS = 90.0  # at most, for schedules to be tried
CHOSEN_SECONDS = 2.0  # without a trial: all are over
PROFILE_STEPS = 24
TRACED_STEPS = 3  # before them


@dataclass(frozen=True, slots=True)
class SteadyMeasurement:
    windows: tuple[SteadyState, ...]
    spans: tuple[tuple[float, float], ...]  # of the windows, in seconds of time.perf_counter
    mean_running: float

    @property
    def state(self) -> SteadyState:
        return together(self.windows)

    @staticmethod
    def together(parts: Sequence[SteadyMeasurement]) -> SteadyMeasurement:
        windows = tuple(window for part in parts for window in part.windows)
        spans = tuple(span for part in parts for span in part.spans)
        running = sum(part.mean_running * part.state.steps for part in parts)
        return SteadyMeasurement(windows, spans, running / together(windows).steps)


def trials_are_over(steps: Sequence[StepStats], begin: int = 0) -> bool:
    """Whether schedules were tried in none of the steps from `begin` on for a while."""
    for at in range(len(steps) - 1, begin - 1, -1):  # seldom far back
        if steps[-1].time_done - steps[at].time_done >= CHOSEN_SECONDS:
            return True
        if steps[at].is_trial:
            return False
    return False


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
        self._wait(lambda: self._is_past(time))

    def wait_for_choice(self, time: float) -> bool:
        """Until no schedule has been tried for a while, or a step completes at that time of
        time.perf_counter; whether it is the former."""
        begin = len(self.steps)
        self._wait(lambda: trials_are_over(self.steps, begin) or self._is_past(time))
        return trials_are_over(self.steps, begin)

    def _wait(self, is_there: Callable[[], bool]) -> None:
        """Raises ValueError when the run ends, or has nobody waiting: it is steady no more."""
        with self._changed:
            self._changed.wait_for(lambda: is_there() or self._has_ended or self._is_short())
            if not is_there():
                raise ValueError(
                    f"after {len(self.steps)} steps no request waited any more: the measurement "
                    "needs more, raise --num-prompts"
                )

    def _is_past(self, time: float) -> bool:
        return bool(self.steps) and self.steps[-1].time_done >= time

    def _is_short(self) -> bool:
        return bool(self.steps) and self.steps[-1].waiting == 0


class SteadyBatch:
    """A full batch of a workload, which goes on for as long as this is entered."""

    def __init__(
        self,
        llm: LLM,
        fill: Sequence[Request],
        stream: Sequence[Request],
        *,
        temperature: float,
        detokenize: bool,
        seed: int,
    ) -> None:
        """`fill`: requests in the midst of their lives; `stream`: the workload, which follows.
        Nothing waits for its end, so it may be long."""
        self.fill_seconds = 0.0
        self.fill_requests = len(fill)
        self._llm = llm
        self._fill_tokens = sum(len(request.prompt_token_ids) for request in fill)
        requests = [*fill, *stream]
        self._prompts = [{"prompt_token_ids": one.prompt_token_ids} for one in requests]
        self._params = sampling_params(
            requests, temperature=temperature, detokenize=detokenize, seed=seed
        )
        self._mean_input = sum(len(one.prompt_token_ids) for one in stream) / len(stream)
        self._mean_output = sum(one.output_len for one in stream) / len(stream)
        self._log = StepLog()
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._generate, name="steady-state")

    def __enter__(self) -> SteadyBatch:
        """Returns when the fill has been prefilled. Raises ValueError when it ends before."""
        self._llm.step_listener = self._log
        started = perf_counter()
        self._thread.start()
        try:
            self._log.wait_for_prefill(self._fill_tokens)
        except BaseException:
            self._end()
            raise
        self.fill_seconds = perf_counter() - started
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def wait(self, seconds: float) -> None:
        self._log.wait_for_time(perf_counter() + seconds)

    def wait_for_choice(self) -> bool:
        """Whether the trials of schedules are over in time."""
        return self._log.wait_for_choice(perf_counter() + CHOICE_SECONDS)

    def settle(self) -> None:
        """Until power and clock are those of what runs now."""
        self.wait(SETTLE_SECONDS)

    def measure(self, seconds: float) -> SteadyMeasurement:
        """Raises ValueError when the stream or the time was too short."""
        self.settle()
        steps = self._log.steps
        begin = len(steps) - 1
        self._log.wait_for_time(steps[begin].time_done + seconds)
        end = len(steps) - 1
        state = window(steps, begin, end, self._mean_input, self._mean_output)
        if state is None:
            raise ValueError(f"no token was generated in {seconds} s: raise --steady-seconds")
        return SteadyMeasurement(
            windows=(state,),
            spans=((steps[begin].time_done, steps[end].time_done),),
            mean_running=sum(step.running for step in steps[begin + 1 : end + 1]) / state.steps,
        )

    def profile(self, profiler: Profiler) -> tuple[Profile | None, str | None]:
        """Of some steps, or why there is none. A few are recorded before, which prepares the GPU's
        tracing. What is measured afterwards may be slower."""
        log = self._log

        def wait(count: int) -> float:
            log.wait_for_steps(1)
            first = log.steps[-1]
            log.wait_for_steps(count)
            last = log.steps[-1]
            return (last.time_done - first.time_done) / (last.step - first.step) * 1e3

        self.settle()
        try:
            profiler.record(lambda: wait(TRACED_STEPS))
            return profiler.record(lambda: wait(PROFILE_STEPS)), None
        except ProfileError as error:
            return None, str(error)

    def _generate(self) -> None:
        try:
            self._llm.generate(self._prompts, self._params, use_tqdm=False)
        except BaseException as error:
            self._failures.append(error)
        finally:
            self._log.end()

    def _end(self) -> None:
        """Raises what has made the run fail."""
        self._llm.abort()
        self._thread.join()
        self._llm.step_listener = None
        if self._failures:
            raise self._failures[0]
