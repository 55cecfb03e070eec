"""The thread that keeps the engine fed: it plans step N+1 while step N runs."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from nanoflow.errors import QueueFullError
from nanoflow.scheduler.batch import build_batch
from nanoflow.scheduler.choose import Option
from nanoflow.scheduler.copies import Copies
from nanoflow.scheduler.deadlines import TIMEOUT, Deadlines
from nanoflow.scheduler.engine import BatchFactory, Engine, StepHandle
from nanoflow.scheduler.idle import IdleMeter
from nanoflow.scheduler.inbox import Inbox
from nanoflow.scheduler.sleep import Sleeper
from nanoflow.scheduler.state import SchedulerState
from nanoflow.scheduler.stats import StepStats
from nanoflow.scheduler.step import Step
from nanoflow.scheduler.switch import ScheduleSwitch

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.05  # between looks at an SSD that works while no step runs


@dataclass(slots=True)
class _StepInFlight:
    step: Step
    handle: StepHandle
    seconds: float  # of planning and submitting
    submit_time: float  # of time.perf_counter


class _EngineFailure(Exception):
    """The engine has failed, not the scheduler."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _EngineFailure(error) from error


class Worker:
    """All that the scheduler's thread does."""

    def __init__(
        self,
        inbox: Inbox,
        engine: Engine,
        make_batch: BatchFactory,
        state: SchedulerState,
        steps_in_flight: int,
        switch: ScheduleSwitch,
        refill: Callable[[], None],
    ) -> None:
        """`refill`: loads all weights again, which have been discarded."""
        self._switch = switch
        self._sleeper = Sleeper(inbox, engine, state, refill)
        self._inbox = inbox
        self._engine = engine
        self._make_batch = make_batch
        self._state = state
        self._steps_in_flight = steps_in_flight
        self._in_flight: deque[_StepInFlight] = deque()  # oldest first
        self._deadlines = Deadlines()
        self._idle = IdleMeter(state.counters.engine_times)
        self._copies = Copies(engine, state.offload)
        self._restarts_left = 1
        self._submitted = 0  # number of the last step that the engine took

    def run(self) -> None:
        try:
            while self._take_inbox():
                try:
                    self._turn()
                except _EngineFailure as failure:
                    self._recover(failure.cause)
                self._end_turn()
        except Exception as error:
            self._fail(error)
        self._end_turn()
        self._copies.close()
        # The traceback of a failure, which others keep, leads here: it shall not hold the engine.
        vars(self).clear()

    def _take_inbox(self) -> bool:
        """Sleeps while there is nothing to do; False when the thread is to end."""
        inbox = self._inbox
        was_busy = self._is_busy()
        with inbox.changed:
            while not (inbox.has_news() or self._is_busy()):
                inbox.changed.wait(IDLE_SECONDS if self._copies.is_working else None)
                self._copies.poll()
            if inbox.forgets_prefixes:
                self._state.forget_prefixes()
                inbox.forgets_prefixes = False
            requests, inbox.requests = inbox.requests, []
            aborts, inbox.aborts = inbox.aborts, []
            calls, inbox.calls = inbox.calls, []
            is_closing = inbox.is_closing
            doomed, inbox.doomed = len(requests) if is_closing else inbox.doomed, None
        now = perf_counter()
        if not was_busy:
            self._idle.wake(now)
        for request in requests:
            try:
                self._state.add(request)
                self._deadlines.add(request)
            except (ValueError, QueueFullError) as error:
                if isinstance(error, QueueFullError):
                    self._state.counters.rejected[error.unit] += 1
                self._state.counters.finished["error"] += 1
                request.finish("error", now, error=error)
        if doomed is not None:
            spared = {request.id for request in requests[doomed:]}
            aborts += [r.id for r in self._state.open_requests() if r.id not in spared]
        for request_id in aborts:
            self._state.end(request_id, "abort", now)
        for request in self._deadlines.expired(now):
            self._state.end(request.id, "abort", now, stop_reason=TIMEOUT)
        for call, done in calls:
            self._answer(call, done)
        return self._is_busy() or not is_closing

    def _answer(self, call: Callable[[Worker], None], done: Future[None]) -> None:
        try:
            call(self)
        except Exception as error:
            done.set_exception(error.with_traceback(None))  # its frames would keep the engine
        else:
            done.set_result(None)

    def use(self, option: Option, is_choice: bool) -> None:
        """Steps run with this schedule from now on, or with what is chosen from then on."""
        self._switch.use(option, is_choice)

    def sleep(self, level: int) -> None:
        """See LLM.sleep."""
        try:
            while self._in_flight and not self._state.has_requests:  # steps of aborted requests
                self._complete(self._in_flight.popleft())
        except _EngineFailure as failure:
            self._recover(failure.cause)
        self._state.reclaim(self._state.arrived_step)
        self._sleeper.sleep(level)

    def wake_up(self, tags: Collection[str]) -> None:
        """See LLM.wake_up."""
        self._sleeper.wake_up(tags)

    def _is_busy(self) -> bool:
        return self._state.has_requests or bool(self._in_flight)

    def _turn(self) -> None:
        """Starts a step if one can be, then completes the oldest if as many run as should.

        What a step is made of depends on the steps waited for, never on how far the device has
        come: the same requests give the same steps.
        """
        begin = perf_counter()
        self._state.reclaim(self._state.arrived_step)
        self._switch.prepare()
        self._copies.poll()
        step = self._state.start_step()
        if not step.plan.is_empty:
            batch = self._make_batch(**build_batch(self._state.slots, step))
            handle = self._submit(step, batch)
            assert handle.step == step.number, f"step {step.number} became {handle.step}"
            now = perf_counter()
            self._in_flight.append(_StepInFlight(step, handle, now - begin, now))
        elif not self._in_flight:
            if self._copies.wait_for_reads():
                return
            assert step.plan.preempted or not self._state.has_requests, "no request can get on"
            return
        if step.plan.is_empty or len(self._in_flight) >= self._steps_in_flight:
            self._complete(self._in_flight.popleft())

    def _submit(self, step: Step, batch: Any) -> StepHandle:
        with _marked():
            self._copies.before_submit(step)
            self._idle.submit(
                perf_counter(), self._in_flight[-1].handle if self._in_flight else None
            )
            handle = self._engine.submit(batch)
            self._submitted = step.number
            keys = int(self._state.slots.computed[step.plan.slots].sum())
            self._switch.start(step.plan.mix(keys), perf_counter())
            self._copies.after_submit(step)
        return handle

    def _end_turn(self) -> None:
        if self._inbox.on_turn is not None:
            self._inbox.on_turn()

    def _complete(self, oldest: _StepInFlight) -> None:
        with _marked():
            result = oldest.handle.wait()
            time_done = perf_counter()
            self._idle.waited(time_done)
            is_last = not self._in_flight
            self._copies.after_wait(oldest.step, oldest.submit_time, is_last=is_last)
        is_trial = self._switch.complete(time_done)
        self._state.complete_step(oldest.step, result, time_done)
        seconds = oldest.seconds + perf_counter() - time_done
        self._state.counters.step_times.add(seconds)
        listener = self._inbox.step_listener
        if listener is None:
            return
        plan = oldest.step.plan
        listener(
            StepStats(
                step=oldest.step.number,
                time_done=time_done,
                prefill_tokens=plan.prefill_rows,
                decode_tokens=plan.decodes,
                output_tokens=len(result.tokens),
                running=self._state.num_running,
                waiting=self._state.num_waiting,
                free_pages=self._state.pages.num_free,
                scheduler_seconds=seconds,
                is_trial=is_trial,
            )
        )

    def _recover(self, cause: Exception) -> None:
        """Restarts the engine for those that wait. Raises `cause` when that does not help."""
        while self._in_flight:
            with contextlib.suppress(_EngineFailure):  # of a step behind the one that failed
                self._complete(self._in_flight.popleft())
        self._switch.forget()
        self._copies.abandon(self._submitted)
        if self._restarts_left == 0:
            raise cause
        self._restarts_left -= 1
        try:
            self._engine.restart()
        except Exception as error:
            raise error from cause
        failed = self._state.fail_running(cause, self._submitted, perf_counter())
        logger.error(
            "the engine has failed and was restarted; %d running requests failed, %d wait: %s",
            failed,
            self._state.num_waiting,
            cause,
        )

    def _fail(self, cause: Exception) -> None:
        inbox = self._inbox
        with inbox.changed:
            inbox.is_closing = True
            inbox.failure = cause
            requests, inbox.requests = inbox.requests, []
            calls, inbox.calls = inbox.calls, []
        for _, done in calls:
            done.set_exception(inbox.closed_error())
        now = perf_counter()
        for request in self._state.open_requests() + requests:
            if request.finish_reason is None:
                self._state.counters.finished["error"] += 1
                request.finish("error", now, error=inbox.closed_error())
