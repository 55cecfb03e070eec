"""The scheduler as other threads see it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from time import perf_counter

from nanoflow.errors import EngineError
from nanoflow.request import Request
from nanoflow.scheduler.choose import Chooser, Option
from nanoflow.scheduler.engine import BatchFactory, Engine
from nanoflow.scheduler.inbox import Inbox
from nanoflow.scheduler.state import SchedulerState
from nanoflow.scheduler.stats import StepListener
from nanoflow.scheduler.switch import ScheduleSwitch
from nanoflow.scheduler.worker import Worker


class SchedulerLoop:
    """Runs requests on an engine, in a thread of its own. Any thread may call its methods.

    When the engine fails, the requests that run fail with its error, and it is restarted for those
    that wait; when it fails again, every open request does and the loop is closed. The engine is
    let go when the thread ends.
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
        refill: Callable[[], None] = lambda: None,
    ) -> None:
        """`state`, the engine and the chooser of schedules belong to the loop's thread from now on.

        `refill` loads weights that a sleep has discarded, in that thread, too.
        `steps_in_flight`: 2 overlaps planning with the engine, 1 takes turns.
        `step_listener` is called in the loop's thread after every step; it must not block or raise.
        """
        self._inbox = Inbox(step_listener)
        switch = ScheduleSwitch(chooser, engine, state.policy, state.counters)
        worker = Worker(self._inbox, engine, make_batch, state, steps_in_flight, switch, refill)
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
        """Queues requests in their order. Raises EngineError once the loop is closed, and while
        the engine sleeps."""
        now = perf_counter()
        with self._inbox.changed:
            if self._inbox.is_closing:
                raise self._inbox.closed_error()
            if self._inbox.asleep:
                raise EngineError("the engine is asleep; call wake_up() first")
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

    def use_schedule(self, option: Option, is_choice: bool = False) -> None:
        """Steps run with this schedule from now on; with `is_choice` it is where the chooser goes
        on from. Returns when the next step will.

        Raises EngineError when the schedule does not fit the engine, or the loop is closed.
        """
        self._call(lambda worker: worker.use(option, is_choice))

    def sleep(self, level: int) -> None:
        """See LLM.sleep."""
        self._call(lambda worker: worker.sleep(level))

    def wake_up(self, tags: Collection[str]) -> None:
        """See LLM.wake_up."""
        self._call(lambda worker: worker.wake_up(tags))

    @property
    def asleep(self) -> frozenset[str]:
        """What sleeps of sleep.TAGS."""
        return self._inbox.asleep

    @property
    def sleep_level(self) -> int:
        """Of the last sleep."""
        return self._inbox.sleep_level

    def _call(self, call: Callable[[Worker], None]) -> None:
        """In the loop's thread, between steps; returns, or raises, as the call has."""
        done: Future[None] = Future()
        with self._inbox.changed:
            if self._inbox.is_closing:
                raise self._inbox.closed_error()
            self._inbox.calls.append((call, done))
            self._inbox.changed.notify()
        try:
            done.result()
        finally:
            del done  # its error has this frame, which has the engine

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
