"""Which requests begin: how fast while many wait, and only what the cache will come to hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from nanoflow.request import Request
from nanoflow.scheduler.forecast import Forecast
from nanoflow.scheduler.prefix import Prefix
from nanoflow.scheduler.slots import Ints, Slots
from nanoflow.scheduler.waiting import WaitingQueue

# A queue is long when it holds this many times what the cache holds of requests at their ends:
# then the time that it takes to get to a steady flow is made up for.
LONG_QUEUE = 2.5
# Of all pages, kept back; in a small cache, what the forecast does not know of last pages is more:
# how full they will be is a guess, whose sum over n requests strays by a part of a page times the
# root of n.
RESERVE, LAST_PAGES = 0.005, 0.5
# Where lengths are drawn, others may come: their sum strays by this share over the root of n.
SPREAD = 0.25
MEMORY = 64  # requests, those begun last, that tell the pace of prefill


class Admission:
    """Offers waiting requests to the policy, a few at a time while the queue is long.

    Requests that begin together and are equally long grow and end together: the cache then is full
    only at the end of their lives. In a steady flow each is at another point of its life, and half
    as many again fit. So a request costs its share of all pages times the steps that it holds them
    (or of all slots, where that is more), and every step pays for one step: as many begin as a
    cache that is always full serves. Whether they fit is for the forecast to say.
    """

    def __init__(self, num_pages: int, num_slots: int, page_size: int) -> None:
        self.forecast = Forecast()
        self._num_tokens = num_pages * page_size
        self._num_slots = num_slots
        self._page_size = page_size
        self._credit = 1.0  # steps that may be charged; the last request may overdraw it
        self._is_pacing = False
        self._begun_tokens = self._begun_steps = 0.0  # of the requests begun last

    @property
    def pace(self) -> float:
        """Rows a step that requests begin with in a steady flow; infinite before any has begun."""
        return self._begun_tokens / self._begun_steps if self._begun_steps else math.inf

    def offer(self, waiting: WaitingQueue, running: int) -> Iterator[Request]:
        """Those of `waiting` that may begin in this step, in order; one at least if none runs."""
        first = next(iter(waiting), None)
        if first is None:
            return
        # What could not be used is made up for by one request: more would end together. Nor is more
        # owed than for those that run, by what is known of lengths now.
        cost = self._cost(first)
        self._credit = min(max(self._credit, -running * cost), cost) + 1
        self._is_pacing = self._is_long(waiting, first)
        credit = self._credit
        for request in waiting:
            if self._is_pacing and credit <= 0 and running > 0:
                return
            credit -= self._cost(request)
            yield request

    def charge(self, request: Request) -> None:
        """A request that was offered begins."""
        steps = self._cost(request)
        if self._is_pacing:
            self._credit -= steps
        self._begun_tokens += request.num_tokens - self._begun_tokens / MEMORY
        self._begun_steps += steps - self._begun_steps / MEMORY

    def _is_long(self, waiting: WaitingQueue, first: Request) -> bool:
        """Nor is a flow made where all slots fit in step: it would take a life to become steady."""
        at_once = at_their_ends(first.num_tokens, self.forecast.steps_left(first), self._num_tokens)
        return at_once < self._num_slots and len(waiting) > LONG_QUEUE * at_once

    def _cost(self, request: Request) -> float:
        steps = self.forecast.steps_left(request)
        return steps_of_the_cache(
            request.num_tokens, steps, self._num_tokens, self._num_slots, self._page_size
        )


def at_their_ends(tokens: int, steps: float, num_tokens: int) -> float:
    """How many requests a cache of `num_tokens` holds that have `tokens` and run for `steps` more,
    when they end. They are let in at a pace only where that is less than there are slots."""
    return num_tokens / (tokens + steps)


def steps_of_the_cache(
    tokens: int, steps: float, num_tokens: int, num_slots: int, page_size: int
) -> float:
    """What a request takes that holds `tokens` and runs for `steps` more, in steps of a whole cache
    of `num_tokens`, or of all slots where that is more. Its last page is half full on the average.
    """
    mean_tokens = tokens + steps / 2 + page_size // 2
    return steps * max(mean_tokens / num_tokens, 1 / num_slots)


def fitting(
    waiting: Iterable[tuple[Request, Prefix]],
    forecast: Forecast,
    slots: Slots,
    running: Ints,
    room: int,
) -> Iterator[tuple[Request, Prefix]]:
    """Those of `waiting`, from the first on, that are expected to end without lack of pages.

    `room`: pages that nobody holds. One that would run alone fits always. A page that n requests
    share counts n times on both sides. Nothing is computed before somebody asks for the first.
    """
    outlook = forecast.outlook(slots, running)
    drawn = np.count_nonzero(~slots.is_length_certain[running])
    stray = SPREAD * math.sqrt(drawn) / max(1, len(running))
    num_pages = room + int(slots.num_pages[running].sum())
    for request, prefix in waiting:
        is_alone = len(outlook) == 0
        outlook.add(request.num_tokens, forecast.steps_left(request))
        num_pages += prefix.num_held
        reserve = max(RESERVE * num_pages, LAST_PAGES * math.sqrt(len(outlook)))
        if not is_alone and outlook.peak() > num_pages - int(reserve + stray * num_pages):
            return
        yield request, prefix
