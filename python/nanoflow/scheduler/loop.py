"""The thread that keeps the engine fed: it plans step N+1 while step N runs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import perf_counter

from nanoflow.errors import EngineError
from nanoflow.request import Request
from nanoflow.scheduler.batch import build_batch
from nanoflow.scheduler.choose import Chooser
from nanoflow.scheduler.copies import Copies
from nanoflow.scheduler.engine import BatchFactory, Engine, StepHandle
from nanoflow.scheduler.state import SchedulerState, Step
from nanoflow.scheduler.switch import ScheduleSwitch


@dataclass(frozen=True, slots=True)
class StepStats:
    """A completed step. Queue lengths and free pages are those after it."""

    step: int
    time_done: float  # seconds of time.perf_counter
    prefill_tokens: int
    decode_tokens: int
    output_tokens: int  # sampled
    running: int
    waiting: int
    free_pages: int
    scheduler_seconds: float  # all work on this step in Python, none of it waiting


StepListener = Callable[[StepStats], None]


@dataclass(slots=True)
class _StepInFlight:
    step: Step
    handle: StepHandle
    seconds: float  # of planning and submitting


@dataclass(slots=True)
class _Inbox:
    """What other threads leave for the scheduler's; `changed` guards all of it."""

    step_listener: StepListener | None
    on_turn: Callable[[], None] | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)
    requests: list[Request] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    forgets_prefixes: bool = False
    doomed: int | None = None  # all open requests and the first so many of `requests`
    is_closing: bool = False
    failure: BaseException | None = None

    def has_news(self) -> bool:
        is_told = self.forgets_prefixes or self.doomed is not None or self.is_closing
        return bool(self.requests or self.aborts) or is_told

    def closed_error(self) -> EngineError:
        if self.failure is None:
            return EngineError("the engine has been closed; make another LLM")
        error = EngineError(f"the engine has failed and is closed: {self.failure}")
        error.__cause__ = self.failure
        return error


class SchedulerLoop:
    """Runs requests on an engine, in a thread of its own. Any thread may call its methods.

    When the engine fails, every open request fails with its error and the loop is closed. The
    engine is let go when the thread ends.
    """

    def __init__(
        self,
        engine: Engine,
        make_batch: BatchFactory,
        state: SchedulerState,
        *,
        steps_in_flight: int = 2,
        step_listener: StepListener | None = None,
        chooser: Chooser | None = None,
    ) -> None:
        """`state`, the engine and the chooser of schedules belong to the loop's thread from now on.

        `steps_in_flight`: 2 overlaps planning with the engine, 1 takes turns.
        `step_listener` is called in the loop's thread after every step; it must not block or raise.
        """
        self._inbox = _Inbox(step_listener)
        switch = ScheduleSwitch(chooser, engine, state.policy)
        worker = _Worker(self._inbox, engine, make_batch, state, steps_in_flight, switch)
        self._thread = threading.Thread(target=worker.run, name="nanoflow-scheduler", daemon=True)
        self._thread.start()

    @property
    def step_listener(self) -> StepListener | None:
        return self._inbox.step_listener

    @step_listener.setter
    def step_listener(self, listener: StepListener | None) -> None:
        self._inbox.step_listener = listener

    @property
    def failure(self) -> BaseException | None:
        """What made the engine fail, if it has."""
        return self._inbox.failure

    def check_health(self) -> None:
        """Raises EngineError with its cause when the engine has failed."""
        if self._inbox.failure is not None:
            raise self._inbox.closed_error()

    def call_after_turns(self, on_turn: Callable[[], None]) -> None:
        """`on_turn` is called in the loop's thread once after all that a turn tells requests.

        It must not block or raise.
        """
        self._inbox.on_turn = on_turn

    def submit(self, requests: Iterable[Request]) -> None:
        """Queues requests in their order. Raises EngineError once the loop is closed."""
        now = perf_counter()
        with self._inbox.changed:
            if self._inbox.is_closing:
                raise self._inbox.closed_error()
            for request in requests:
                request.arrival_time = now
                self._inbox.requests.append(request)
            self._inbox.changed.notify()

    def abort(self, request_ids: Iterable[str]) -> None:
        """Finishes requests with what they have generated; unknown ids are left alone."""
        with self._inbox.changed:
            self._inbox.aborts.extend(request_ids)
            self._inbox.changed.notify()

    def forget_prefixes(self) -> None:
        """Requests that start from now on find nothing in the KV cache."""
        with self._inbox.changed:
            self._inbox.forgets_prefixes = True
            self._inbox.changed.notify()

    def abort_all(self) -> None:
        """Finishes every request submitted so far with what it has generated."""
        with self._inbox.changed:
            self._inbox.doomed = len(self._inbox.requests)
            self._inbox.changed.notify()

    def close(self) -> None:
        """Aborts what is open and ends the thread. May be called more than once."""
        with self._inbox.changed:
            self._inbox.is_closing = True
            self._inbox.changed.notify()
        self._thread.join()


class _Worker:
    """All that the scheduler's thread does."""

    def __init__(
        self,
        inbox: _Inbox,
        engine: Engine,
        make_batch: BatchFactory,
        state: SchedulerState,
        steps_in_flight: int,
        switch: ScheduleSwitch,
    ) -> None:
        self._switch = switch
        self._inbox = inbox
        self._engine = engine
        self._make_batch = make_batch
        self._state = state
        self._steps_in_flight = steps_in_flight
        self._in_flight: deque[_StepInFlight] = deque()  # oldest first
        self._copies = None if state.offload is None else Copies(engine, state.offload)

    def run(self) -> None:
        try:
            while self._take_inbox():
                self._turn()
                self._end_turn()
        except Exception as error:
            self._fail(error)
        self._end_turn()

    def _take_inbox(self) -> bool:
        """Sleeps while there is nothing to do; False when the thread is to end."""
        inbox = self._inbox
        with inbox.changed:
            while not (inbox.has_news() or self._is_busy()):
                inbox.changed.wait()
            if inbox.forgets_prefixes:
                self._state.forget_prefixes()
                inbox.forgets_prefixes = False
            requests, inbox.requests = inbox.requests, []
            aborts, inbox.aborts = inbox.aborts, []
            is_closing = inbox.is_closing
            doomed, inbox.doomed = len(requests) if is_closing else inbox.doomed, None
        now = perf_counter()
        for request in requests:
            try:
                self._state.add(request)
            except ValueError as error:
                self._state.counters.finished["error"] += 1
                request.finish("error", now, error=error)
        if doomed is not None:
            spared = {request.id for request in requests[doomed:]}
            aborts += [r.id for r in self._state.open_requests() if r.id not in spared]
        for request_id in aborts:
            self._state.abort(request_id, now)
        return self._is_busy() or not is_closing

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
        step = self._state.start_step()
        if not step.plan.is_empty:
            batch = self._make_batch(**build_batch(self._state.slots, step))
            if self._copies is not None:
                self._copies.before_submit(step)
            handle = self._engine.submit(batch)
            self._switch.start(self._state.mix_of(step.plan), perf_counter())
            if self._copies is not None:
                self._copies.after_submit(step)
            assert handle.step == step.number, f"step {step.number} became {handle.step}"
            self._in_flight.append(_StepInFlight(step, handle, perf_counter() - begin))
        elif not self._in_flight:
            assert step.plan.preempted or not self._state.has_requests, "no request can get on"
            return
        if step.plan.is_empty or len(self._in_flight) >= self._steps_in_flight:
            self._complete(self._in_flight.popleft())

    def _end_turn(self) -> None:
        if self._inbox.on_turn is not None:
            self._inbox.on_turn()

    def _complete(self, oldest: _StepInFlight) -> None:
        result = oldest.handle.wait()
        time_done = perf_counter()
        self._switch.complete(time_done)
        if self._copies is not None:
            self._copies.after_wait(oldest.step, is_last=not self._in_flight)
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
            )
        )

    def _fail(self, cause: Exception) -> None:
        inbox = self._inbox
        with inbox.changed:
            inbox.is_closing = True
            inbox.failure = cause
            requests, inbox.requests = inbox.requests, []
        now = perf_counter()
        for request in self._state.open_requests() + requests:
            if request.finish_reason is None:
                self._state.counters.finished["error"] += 1
                request.finish("error", now, error=inbox.closed_error())
