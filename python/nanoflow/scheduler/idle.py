"""How long the device may have waited for the scheduler."""

from __future__ import annotations

from nanoflow.scheduler.engine import StepHandle
from nanoflow.scheduler.stats import EngineTimes


class IdleMeter:
    """Belongs to the scheduler's thread. Times are seconds of time.perf_counter.

    A step that is submitted when the one before it is done already found the device idle: since
    when is not known, but not since before the scheduler last waited. So the truth is less.
    """

    def __init__(self, times: EngineTimes) -> None:
        self._times = times
        self._since = 0.0  # the device had something to do at this time, or there was nothing
        self._counted = 0.0  # up to here, in times.open

    def wake(self, now: float) -> None:
        """Requests have come where there were none."""
        self._since = self._counted = now

    def submit(self, now: float, previous: StepHandle | None) -> None:
        """A step is about to be submitted; `previous` was, and has not been waited for."""
        if previous is None or previous.is_done():
            self._times.idle += now - self._since

    def waited(self, now: float) -> None:
        """A step has been waited for."""
        self._since = now
        self._times.open += now - self._counted
        self._counted = now
