"""Follows the choice of a schedule from step to step, and tells the chooser what steps took."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nanoflow.scheduler.choose import Chooser, Mix, Option
from nanoflow.scheduler.engine import Engine
from nanoflow.scheduler.policy import Policy
from nanoflow.scheduler.stats import Counters


@dataclass(frozen=True, slots=True)
class _Started:
    option: int | None  # None: not chosen
    is_trial: bool
    mix: Mix
    time: float  # seconds of time.perf_counter


class ScheduleSwitch:
    """Belongs to the scheduler's thread. Without a chooser steps run with the schedule that engine
    and policy were made with, until told to use another."""

    def __init__(
        self, chooser: Chooser | None, engine: Engine, policy: Policy, counters: Counters
    ) -> None:
        self._chooser, self._engine, self._policy = chooser, engine, policy
        self._is_choosing = chooser is not None
        self._counters = counters
        if chooser is not None:
            counters.schedules = {option.name: 0 for option in chooser.options}
        self._option: int | None = None  # that engine and policy follow
        self._mix = Mix(0)  # of the last step
        self._started: deque[_Started] = deque()  # oldest first
        self._last_done = 0.0  # seconds of time.perf_counter

    def use(self, option: Option, is_choice: bool) -> None:
        """From the next step on, and nothing is chosen any more; with `is_choice` the chooser goes
        on from it, if there is one. Raises EngineError on a schedule that does not fit the engine,
        which goes on as before then."""
        self._follow(option)
        self._option = None
        self._is_choosing = is_choice and self._chooser is not None

    def prepare(self) -> None:
        """Before a step is planned, which will be much like the last one."""
        if self._chooser is None or not self._is_choosing:
            return
        number = self._chooser.choose(self._mix)
        if number == self._option:
            return
        self._follow(self._chooser.options[number])
        self._option = number

    def _follow(self, option: Option) -> None:
        self._engine.set_schedule(option.schedule)
        self._policy.deal_with(option.dealer)

    def start(self, mix: Mix, time: float) -> None:
        """A step has been submitted."""
        self._mix = mix
        chooser = self._chooser if self._option is not None else None
        is_trial = chooser is not None and chooser.is_trying
        self._started.append(_Started(self._option, is_trial, mix, time))

    def complete(self, time: float) -> bool:
        """The oldest step is done. One that was queued while the step before it ran took all the
        time since that was done. Returns whether its schedule was being tried."""
        step = self._started.popleft()
        if self._chooser is not None and step.option is not None:
            self._counters.schedules[self._chooser.options[step.option].name] += 1
            if step.time <= self._last_done:
                self._chooser.observe(step.option, step.mix, time - self._last_done)
        self._last_done = time
        return step.is_trial

    def forget(self) -> None:
        """The steps on their way have failed."""
        self._started.clear()
