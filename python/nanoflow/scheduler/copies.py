"""Page copies on their way between the KV cache and the host pool."""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from nanoflow.offload.offload import Offload, PageMoves
from nanoflow.scheduler.engine import CopyHandle, Engine
from nanoflow.scheduler.step import Step

READ_SECONDS = 0.02  # between looks at requests that wait for nothing but reads


@dataclass(frozen=True, slots=True)
class _Copy:
    step: int  # that it was begun with
    moves: PageMoves
    is_load: bool
    handle: CopyHandle


class Copies:
    """Hands a step's copies to the engine, and waits for them with the step behind it.

    Without an offload there are none, and all of this does nothing.
    """

    def __init__(self, engine: Engine, offload: Offload | None) -> None:
        self._engine = engine
        self._offload = offload
        self._in_flight: deque[_Copy] = deque()  # oldest first
        self._planned: list[tuple[PageMoves, bool]] = []  # of the step that is being submitted
        self._time_done = 0.0  # of the last step waited for

    @property
    def is_working(self) -> bool:
        """Whether poll() will have something to do though no step runs."""
        return self._offload is not None and self._offload.is_working

    def poll(self) -> None:
        """To be called every turn, and while there are none as long as is_working."""
        if self._offload is not None:
            self._offload.poll()

    def wait_for_reads(self) -> bool:
        """Sleeps a little if requests may be waiting for reads; says whether they may."""
        if self._offload is None or not self._offload.is_reading:
            return False
        self._offload.wait(READ_SECONDS)
        return True

    def close(self) -> None:
        """Leaves on the SSD what is worth keeping."""
        if self._offload is not None:
            self._offload.close()

    def before_submit(self, step: Step) -> None:
        """Begins to load what the step needs."""
        self._planned = [(step.loads, True), (step.stores, False)]
        self._begin(step.number, step.loads, is_load=True)

    def after_submit(self, step: Step) -> None:
        """Begins to store what the step fills."""
        self._begin(step.number, step.stores, is_load=False)

    def after_wait(self, step: Step, submit_time: float, *, is_last: bool) -> None:
        """Waits for the copies of the steps before it, of the step itself if no other is in
        flight: then nothing is left that could hold a page up.

        `submit_time`: seconds of time.perf_counter.
        """
        if self._offload is None:
            return
        now = perf_counter()
        seconds = now - max(submit_time, self._time_done)
        self._time_done = now
        self._offload.observe_step(step.plan.prefill_rows, step.plan.decodes, seconds)
        settled = step.number if is_last else step.number - 1
        while self._in_flight and self._in_flight[0].step <= settled:
            copy = self._in_flight.popleft()
            done = self._offload.loaded if copy.is_load else self._offload.stored
            done(copy.moves, copy.handle.wait())
        self._offload.settled_step = settled

    def abandon(self, last_step: int) -> None:
        """The engine has failed, at or behind step `last_step`: returns when no copy is on its way.

        What they brought must not be looked for any more.
        """
        if self._offload is None:
            return
        for copy in self._in_flight:
            with contextlib.suppress(Exception):  # which is the engine's
                copy.handle.wait()
            self._offload.abandon(copy.moves, is_load=copy.is_load)
        self._in_flight.clear()
        for moves, is_load in self._planned:
            self._offload.abandon(moves, is_load=is_load)
        self._planned.clear()
        self._offload.settled_step = last_step

    def _begin(self, step: int, moves: PageMoves, *, is_load: bool) -> None:
        if moves:
            copy = self._engine.load_pages if is_load else self._engine.store_pages
            handle = copy(np.array(moves.pages, np.int32), np.array(moves.slots, np.int32))
            self._in_flight.append(_Copy(step, moves, is_load, handle))
        self._planned.remove((moves, is_load))
