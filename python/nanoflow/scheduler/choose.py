"""Which schedule the next step runs with: what the load is, what was predicted, what was measured.

Only schedules that are predicted to come near the best one for a step stand. Those that stand are
tried in real traffic: what a schedule's steps took, over what they were predicted to take, says by
how much predictions of it are wrong. They take several short turns each, for while they are tried
the device warms up and the load may still grow, which is not to count against those that come
first: turns under a load that has become another do not count. One that is far from the best takes
no second one. Then the one whose corrected predictions are best comes into use, for some minutes or
until another's have been better for a while: at once where the load changes much, and not for a
step now and then. What is in use goes on being measured: of several that are alike, the one that
was fast by chance comes first. So few requests get the plan for few requests, a load may grow after
the trials, and the tables that predictions come from need not be exact. Steps are corrected, and
schedules tried, in groups of steps that are alike. A group is known by its first step, and goes on
while steps are like that one or, now and then, are not: a load that varies has one group.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from statistics import fmean, median
from typing import Any

from nanoflow.scheduler.deal import Dealer

logger = logging.getLogger(__name__)

TURNS = 3  # of a trial
TURN_SECONDS = 1.0  # of measured steps
LATEST_TURNS = 9  # those that count, and most of a trial
LIKE_TURNS = 0.25  # at most the distance of their loads from the latest one's
# Of a turn that are not measured: graphs are captured, and a GPU's clock follows the schedule.
SETTLE_STEPS, SETTLE_SECONDS = 8, 1.0
KEEP_SECONDS = 600.0  # of steps until a choice is looked at again
# A schedule predicted to take more times the best one's time does not stand, and one that does take
# more in its first turn has no second one.
NEAR = 1.15
STANDING = 4  # at most
# What another option must gain to come into use, on the mean of about so many steps: after a switch
# it takes a while until the device's clock suits what runs.
WORTH_A_SWITCH, MEAN_STEPS = 0.01, 32
# Of two steps that are alike: times the rows, times the keys, and parts of the rows that decode.
ROWS_APART, KEYS_APART, DECODING_APART = 1.5, 3.0, 0.25
PATIENCE = 16  # steps in a row that are unlike a group's before it is left


@dataclass(frozen=True, slots=True)
class Mix:
    """What a step computes."""

    rows: int
    decodes: int = 0  # rows of them
    keys: int = 0  # that all requests of the step have in the KV cache

    @property
    def decoding(self) -> float:
        """Part of the rows."""
        return self.decodes / max(1, self.rows)

    def distance(self, other: Mix) -> float:
        """At most 1 where both are alike."""
        return max(
            _apart(self.rows, other.rows, ROWS_APART),
            _apart(self.keys, other.keys, KEYS_APART),
            abs(self.decoding - other.decoding) / DECODING_APART,
        )


@dataclass(frozen=True, slots=True)
class _Turn:
    load: Mix  # the mean of its steps
    ratio: float  # the median of each one's time to the predicted one


@dataclass(frozen=True, slots=True)
class Option:
    """A schedule, and how requests are dealt to its segments."""

    name: str
    schedule: Any  # for Engine.set_schedule
    dealer: Dealer


# Predicted time of a step of this mix with an option, by its number; in any unit.
Predict = Callable[[int, Mix], float]


@dataclass(slots=True)
class _Trial:
    """What was measured of one option in one group of steps."""

    steps: int = 0  # of this turn
    settling: float = 0.0  # seconds of those that are not measured
    seconds: float = 0.0  # of those that are
    ratios: list[float] = field(default_factory=list)  # of each one's time to the predicted one
    loads: list[Mix] = field(default_factory=list)  # each one's
    turns: list[_Turn] = field(default_factory=list)  # that are over, and count
    taken: int = 0  # turns, whether they count or not
    is_over: bool = False  # decides what comes into use

    @property
    def correction(self) -> float:
        """Of predictions. Of the turns too the median counts: the first may be unlike the rest."""
        return median(turn.ratio for turn in self.turns)

    @property
    def is_enough(self) -> bool:
        return len(self.turns) >= TURNS or self.taken >= LATEST_TURNS

    def measure(self, mix: Mix, seconds: float, expected: float) -> bool:
        """A step, and whether it ended a turn. The median counts, for now and then one waits for a
        graph to be captured."""
        self.steps += 1
        if self.steps <= SETTLE_STEPS or self.settling < SETTLE_SECONDS:
            self.settling += seconds
            return False
        self.seconds += seconds
        self.ratios.append(seconds / expected)
        self.loads.append(mix)
        if self.seconds < TURN_SECONDS:
            return False
        turn = _Turn(_mean(self.loads), median(self.ratios))
        alike = [old for old in self.turns if old.load.distance(turn.load) <= LIKE_TURNS]
        self.turns = [*alike, turn][-LATEST_TURNS:]
        self.taken += 1
        self._begin_measuring()  # goes on with the next one, settled
        return True

    def begin_turn(self) -> None:
        """What follows is measured once the device has settled."""
        self.steps, self.settling = 0, 0.0
        self._begin_measuring()

    def _begin_measuring(self) -> None:
        self.seconds, self.ratios, self.loads = 0.0, [], []


@dataclass(slots=True)
class _Group:
    first: Mix
    trying: int | None = None  # the option whose turn has begun
    trials: defaultdict[int, _Trial] = field(default_factory=lambda: defaultdict(_Trial))
    seconds: float = 0.0  # of steps with options that have been tried
    was_decided: bool = False  # trials were over


class Chooser:
    """Chooses among options. Not thread-safe: it belongs to the scheduler's thread."""

    def __init__(
        self, options: Sequence[Option], predict: Predict, always: int | None = None
    ) -> None:
        """`always`: an option that stands whatever is predicted."""
        self.options = list(options)
        self._predict = predict
        self._always = always
        self._memo: dict[tuple[int, Mix], float] = {}
        self._groups: list[_Group] = []
        self._kept = -1  # the option in use since what was tried decides
        self._gains: dict[int, float] = {}  # by which others were better, on the mean
        self._group: _Group | None = None  # that is going on
        self._unlike = 0  # steps in a row
        self._measured = -1  # the option of the last step
        self.is_trying = False  # with the option that was chosen last

    def choose(self, mix: Mix) -> int:
        """The option for a step that will be much like `mix`."""
        near = self._near(mix)
        standing = self._standing(near)
        self.is_trying = False
        if len(standing) == 1:
            return standing[0]
        group = self._group_of(mix)
        trials = group.trials
        if group.trying not in near:
            untried = [number for number in standing if self._is_worth_trying(group, number, near)]
            # Those that have had fewer turns are next.
            group.trying = min(untried, key=lambda n: trials[n].taken, default=None)
            if group.trying is not None:
                trials[group.trying].begin_turn()
        if group.trying is not None:
            self.is_trying = True
            return group.trying
        group.was_decided = True
        self._keep({n: near[n] * trials[n].correction for n in near if trials[n].is_over})
        return self._kept

    def _is_worth_trying(self, group: _Group, number: int, near: Mapping[int, float]) -> bool:
        """Once the trials have been over, what only stands now and then has to be predicted to be
        better than what is in use."""
        trial = group.trials[number]
        if trial.is_over:
            return False
        if not group.was_decided or trial.taken > 0:
            return True
        return near[number] < near.get(self._kept, math.inf)

    def _keep(self, times: Mapping[int, float]) -> None:
        """What is in use, unless one of these has been better for a while."""
        if self._kept not in times:
            self._kept = min(times, key=lambda number: times[number])
            self._gains = {}
            return
        for number, time in times.items():
            gain = self._gains.get(number, 0.0)
            self._gains[number] = gain + (times[self._kept] / time - 1 - gain) / MEAN_STEPS
        best = max(times, key=lambda number: self._gains[number])
        if self._gains[best] > WORTH_A_SWITCH:
            self._kept, self._gains = best, {}

    def observe(self, number: int, mix: Mix, seconds: float) -> None:
        """A step ran with an option and took so long, nothing else running on the device."""
        group = self._group
        if group is None or group.first.distance(mix) > 1:
            return
        trial = group.trials[number]
        was_over = trial.is_over
        if was_over and number != self._measured:
            trial.begin_turn()
        self._measured = number
        if trial.measure(mix, seconds, self._expected(number, mix)):
            if number == group.trying:
                group.trying = None
            self._end_trials(group)
        if was_over:
            group.seconds += seconds
            if group.seconds >= KEEP_SECONDS:
                self._groups.remove(group)
                self._group = None

    def _end_trials(self, group: _Group) -> None:
        """Of those that have had their turns, and of those that are far from the best."""
        times = {n: self._seconds(group, n) for n, trial in group.trials.items() if trial.turns}
        limit = NEAR * min(times.values())
        for number, seconds in times.items():
            trial = group.trials[number]
            if trial.is_over or (seconds <= limit and not trial.is_enough):
                continue
            trial.is_over = True
            logger.info(
                "schedule %s takes %.2f ms for a step of %d rows, of which %d decode",
                self.options[number].name,
                1e3 * seconds,
                group.first.rows,
                group.first.decodes,
            )

    def _seconds(self, group: _Group, number: int) -> float:
        """Of the same step for all options, though they were measured in different ones."""
        return group.trials[number].correction * self._expected(number, group.first)

    def _group_of(self, mix: Mix) -> _Group:
        """That of a step to come."""
        group = self._group
        self._unlike = self._unlike + 1 if group and group.first.distance(mix) > 1 else 0
        if group is None or self._unlike > PATIENCE:
            alike = [other for other in self._groups if other.first.distance(mix) <= 1]
            if not alike:
                alike = [_Group(mix)]
                self._groups += alike
            group = min(alike, key=lambda other: other.first.distance(mix))
            self._group, self._unlike = group, 0
        return group

    def _near(self, mix: Mix) -> dict[int, float]:
        """What is predicted of those that come near the best one, the best first, and of the one
        that always stands."""
        times = {number: self._expected(number, mix) for number in range(len(self.options))}
        limit = NEAR * min(times.values())
        near = [n for n in times if times[n] <= limit or n == self._always]
        return {number: times[number] for number in sorted(near, key=lambda n: times[n])}

    def _standing(self, near: Mapping[int, float]) -> list[int]:
        """Of these, the best first."""
        standing = list(near)[:STANDING]
        if self._always is not None and self._always not in standing:
            standing = [*standing[: STANDING - 1], self._always]
        return standing

    def _expected(self, number: int, mix: Mix) -> float:
        like = Mix(_rounded(mix.rows), _rounded(mix.decodes), _rounded(mix.keys))
        if (number, like) not in self._memo:
            self._memo[number, like] = self._predict(number, like)
        return self._memo[number, like] * mix.rows / max(1, like.rows)


def _mean(mixes: Sequence[Mix]) -> Mix:
    return Mix(*(round(fmean(values)) for values in zip(*map(astuple, mixes), strict=True)))


def _apart(a: int, b: int, limit: float) -> float:
    """0 where both are the same, 1 where one is `limit` times the other."""
    return abs(math.log((a + 1) / (b + 1))) / math.log(limit)


def _rounded(count: int) -> int:
    """To three or four binary digits: within a sixteenth."""
    shift = max(0, count.bit_length() - 4)
    return ((count + (1 << shift >> 1)) >> shift) << shift
