"""Which schedule the next step runs with: what the load is, what was predicted, what was measured.

Steps are grouped by how many rows they have and how many keys they read, an octave a group, and by
how many of the rows decode. In each group only schedules that are predicted to come near the best
one stand; those that stand are tried in turn in real traffic, and the one that was fastest is kept,
for some minutes. So few requests get the plan for few requests, and the tables that predictions
come from need not be exact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from nanoflow.scheduler.deal import Dealer

logger = logging.getLogger(__name__)

TRIAL_SECONDS = 3.0  # of measured steps; a GPU's power and clock have settled by then
SETTLE_STEPS = 8  # of a trial that are not measured: plans are made and graphs captured
KEEP_SECONDS = 600.0  # of steps until a choice is looked at again
NEAR = 1.15  # a schedule predicted to take more times the best one's time does not stand
STANDING = 4  # at most


@dataclass(frozen=True, slots=True)
class Mix:
    """What a step computes."""

    rows: int
    decodes: int = 0  # rows of them
    keys: int = 0  # that all requests of the step have in the KV cache


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

    unsettled: int  # steps still to come that are not measured
    seconds: float = 0.0
    ratios: list[float] = field(default_factory=list)  # of each step

    @property
    def score(self) -> float:
        """Time of a step relative to what the first option was predicted to take for the same work:
        lower is faster. The median, for now and then a step waits for a graph to be captured."""
        return median(self.ratios)


@dataclass(slots=True)
class _Group:
    standing: list[int]
    trials: dict[int, _Trial] = field(default_factory=dict)
    chosen: int | None = None
    seconds: float = 0.0  # of steps since it was chosen


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
        self._groups: dict[tuple[int, int, int], _Group] = {}

    def choose(self, mix: Mix) -> int:
        """The option for a step that will be much like `mix`."""
        group = self._groups[self._key(mix)]
        return self._on_trial(group) if group.chosen is None else group.chosen

    def observe(self, number: int, mix: Mix, seconds: float) -> None:
        """A step ran with an option and took so long, nothing else running on the device."""
        key = self._key(mix)
        group = self._groups[key]
        if group.chosen is not None:
            group.seconds += seconds
            if group.seconds >= KEEP_SECONDS:
                del self._groups[key]
            return
        if number not in group.standing:
            return
        trial = group.trials.setdefault(number, _Trial(SETTLE_STEPS))
        if trial.unsettled > 0:
            trial.unsettled -= 1
            return
        trial.seconds += seconds
        trial.ratios.append(seconds / self._expected(0, mix))
        if all(self._is_tried(group, other) for other in group.standing):
            group.chosen = min(group.standing, key=lambda other: group.trials[other].score)
            logger.info(
                "steps of about %d rows run with schedule %s: %s",
                mix.rows,
                self.options[group.chosen].name,
                ", ".join(
                    f"{self.options[other].name} took {group.trials[other].score:.3g}"
                    for other in group.standing
                ),
            )

    def _key(self, mix: Mix) -> tuple[int, int, int]:
        """Of its group, which is there then. Full steps have as many rows as a power of two or a
        few less, and about half of them decode: neither lies at a border of groups."""
        decoding = round(4 * mix.decodes / max(1, mix.rows))
        key = (max(0, mix.rows - 1).bit_length(), mix.keys.bit_length(), decoding)
        if key not in self._groups:
            times = {number: self._expected(number, mix) for number in range(len(self.options))}
            limit = NEAR * min(times.values())
            near = sorted((n for n in times if times[n] <= limit), key=lambda n: times[n])
            standing = near[:STANDING]
            if self._always is not None and self._always not in standing:
                standing = [*standing[: STANDING - 1], self._always]
            self._groups[key] = _Group(standing, chosen=standing[0] if len(standing) == 1 else None)
        return key

    def _is_tried(self, group: _Group, number: int) -> bool:
        return number in group.trials and group.trials[number].seconds >= TRIAL_SECONDS

    def _on_trial(self, group: _Group) -> int:
        return next(other for other in group.standing if not self._is_tried(group, other))

    def _expected(self, number: int, mix: Mix) -> float:
        like = Mix(_rounded(mix.rows), _rounded(mix.decodes), _rounded(mix.keys))
        if (number, like) not in self._memo:
            self._memo[number, like] = self._predict(number, like)
        return self._memo[number, like]


def _rounded(count: int) -> int:
    """To two or three binary digits: within an eighth."""
    shift = max(0, count.bit_length() - 3)
    return ((count + (1 << shift >> 1)) >> shift) << shift
