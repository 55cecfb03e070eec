"""Who takes part in the next step: decisions only, made from what the scheduler knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nanoflow.request import Request
from nanoflow.scheduler.admission import fitting
from nanoflow.scheduler.choose import Mix
from nanoflow.scheduler.deal import Dealer
from nanoflow.scheduler.even import SOON, prefill_rows
from nanoflow.scheduler.forecast import Forecast
from nanoflow.scheduler.prefix import Prefix
from nanoflow.scheduler.slots import Ints, Slots
from nanoflow.scheduler.victims import Victims

LITTLE = 16  # one part in so many of a segment
WORTH_CUTTING = 128  # rows: a tile of a GPU's products
PADDED_ROWS = 64  # to a multiple of which a GPU's segments are padded
SCORED_ROWS = 64  # head rows that prompts can count on, beside one a request


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Who takes part in a step, in the order of the batch. Nobody does when `slots` is empty."""

    preempted: list[int]  # slots that give their pages up first
    admitted: list[tuple[int, Request]]  # into which slots, oldest first
    prefixes: list[Prefix]  # of each admitted request, which it starts with
    slots: Ints  # [R] by segment; inside one, decodes before prefill chunks
    rows: Ints  # [R] tokens computed of each
    segment_requests: Ints  # [segments + 1] first request of each segment
    decodes: int  # requests that decode
    prefill_rows: int

    @property
    def is_empty(self) -> bool:
        return len(self.slots) == 0

    def mix(self, keys: int) -> Mix:
        """What the step computes, where its attention reads so many keys."""
        return Mix(self.decodes + self.prefill_rows, self.decodes, keys)


@dataclass(slots=True)
class _Prefill:
    """A request that could prefill in this step."""

    slot: int
    left: int  # rows until it decodes
    room: int  # rows that fit into the pages it has, or is sure to get
    admission: tuple[Request, Prefix] | None = None  # when it is to be admitted
    claims: int = 0  # free pages that its prefix takes then
    is_scored: bool = False  # its rows tell how likely the prompt's tokens are


class Policy:
    """Decodes first, then prefill chunks until the step has max_num_batched_tokens rows.

    Requests are admitted in the order in which they are offered while there are a slot, pages for
    their whole prefill, and, by the forecast, pages for all that run with them until they end.
    A request that lacks a page for its next row sits the step out; unless pages on their way back
    will do, some of those younger than it are preempted, the cheapest to resume (victims.py). So
    the oldest request always gets on, and as the cache holds at least one request of full length,
    every request finishes.
    """

    def __init__(
        self, dealer: Dealer, max_num_batched_tokens: int, max_scored_rows: int = SCORED_ROWS
    ) -> None:
        """`max_scored_rows`: of a step, where as many requests are sampled as there are slots."""
        self._dealer = dealer
        self._max_rows = max_num_batched_tokens
        self._max_scored_rows = max_scored_rows

    def deal_with(self, dealer: Dealer) -> None:
        """From the next step on: the schedule's segments have changed."""
        self._dealer = dealer

    def next_step(
        self,
        slots: Slots,
        waiting: Iterable[tuple[Request, Prefix]],
        free_slots: Sequence[int],
        free_pages: int,
        retired_pages: int,
        forecast: Forecast,
        victims: Victims,
        num_waiting: int,
        pace: float,
    ) -> StepPlan:
        """Plans a step and changes nothing.

        `waiting` are in order of age, each with what the cache holds of it, and may be admitted to
        `free_slots`, the last of them first.
        `retired_pages` will be free when the steps in flight have completed.
        `num_waiting`: of whom `waiting` may be but some.
        `pace`: prefill rows of a step in a steady flow.
        """
        running, takers, preempted = self._preempt(slots, free_pages, retired_pages, victims)
        fits = _fits(slots, takers, free_pages)
        stalled = not fits.all()
        takers = takers[fits]
        is_decode = slots.computed[takers] >= slots.prefill_len[takers]
        decodes, prefilling = takers[is_decode], takers[~is_decode]
        lacked = int(_pages_lacking(slots, decodes).sum())
        free_pages -= lacked
        room = self._max_rows - len(decodes)
        prefills = _running_prefills(slots, prefilling)
        admissible: list[_Prefill] = []
        if not (preempted or stalled):
            spare = free_pages - _pages_of_prefills_to_come(slots, running)
            pages = free_pages + lacked + retired_pages
            fits_later = fitting(waiting, forecast, slots, running, pages)
            admissible = self._admissible(
                slots, prefills, fits_later, free_slots, spare, SOON * room
            )
        prefills += admissible
        is_steady = len(admissible) < num_waiting
        budget = room
        if is_steady:
            left = sum(prefill.left for prefill in prefills)
            even = prefill_rows(len(decodes), left, pace, self._dealer.segments)
            budget = min(room, even)
        free_pages -= int(_pages_lacking(slots, prefilling).sum())
        return self._deal(slots, decodes, prefills, budget, free_pages, preempted, is_steady)

    def _takers(self, slots: Slots, running: Ints) -> Ints:
        """Running slots with a row to compute in this step, if they get a page for it.

        A request whose last token is in flight has none, nor one whose mask waits for its token.
        Prefills count as far as the step's rows go when none takes more than a segment's share, and
        a few more for cuts to be made up.
        """
        computed = slots.computed[running]
        left = slots.prefill_len[running] - computed
        is_prefill = left > 0
        takes = ~is_prefill & (computed + 1 < slots.max_len[running])
        takes &= ~slots.binds_late[running] | (slots.known[running] > computed)
        if is_prefill.any():
            budget = self._max_rows - int(takes.sum())
            left = np.minimum(left[is_prefill], self._share(budget))
            enough = int(np.sum(np.cumsum(left) - left < budget)) + self._more(budget)
            takes[is_prefill] = np.arange(len(left)) < enough
        return running[takes]

    def _share(self, prefill_rows: int) -> int:
        """Prefill rows of one segment, about."""
        return -(-prefill_rows // self._dealer.segments)

    def _more(self, prefill_rows: int) -> int:
        """Requests beyond those that fill a step: no chunk need overflow a segment to fill it."""
        return self._dealer.segments - 1 if prefill_rows > 0 else 0

    def _preempt(
        self, slots: Slots, free_pages: int, retired_pages: int, victims: Victims
    ) -> tuple[Ints, Ints, list[int]]:
        """Those still running, of them those with a row to compute, and those who must give way."""
        running = slots.running
        preempted: list[int] = []
        while True:
            takers = self._takers(slots, running)
            stalled = takers[~_fits(slots, takers, free_pages)]
            # Each lacks one page; retired pages serve the oldest.
            if len(stalled) <= retired_pages or running[-1] == stalled[retired_pages]:
                return running, takers, preempted
            younger = slots.age[running] > slots.age[stalled[retired_pages]]
            victim, freed = victims.choose(running[younger])
            running = running[running != victim]
            preempted.append(victim)
            retired_pages += freed

    def _admissible(
        self,
        slots: Slots,
        prefills: list[_Prefill],
        waiting: Iterable[tuple[Request, Prefix]],
        free_slots: Sequence[int],
        spare_pages: int,
        budget: int,
    ) -> list[_Prefill]:
        """Waiting requests that may prefill: enough to fill every segment of the step."""
        share = self._share(budget)
        covered = sum(min(prefill.left, share) for prefill in prefills)
        more = self._more(budget)
        admissible: list[_Prefill] = []
        for slot, (request, prefix) in zip(reversed(free_slots), waiting, strict=False):
            if covered >= budget:
                more -= 1
            if more < 0:
                break
            left = request.num_tokens - prefix.num_pages * slots.page_size
            tokens = min(request.num_tokens + 1, request.max_len - 1)
            pages = -(-tokens // slots.page_size) - prefix.num_held
            if pages > spare_pages:
                break
            spare_pages -= pages
            covered += min(left, share)
            admissible.append(
                _Prefill(slot, left, 0, (request, prefix), prefix.claims, request.scores_prompt)
            )
        return admissible

    def _deal(
        self,
        slots: Slots,
        decodes: Ints,
        prefills: list[_Prefill],
        budget: int,
        free_pages: int,
        preempted: list[int],
        is_steady: bool,
    ) -> StepPlan:
        """Gives decodes and prefill chunks to segments.

        The next chunk goes to the segment that lacks the most rows. It is cut there when the step
        gets full all the same from the requests behind it, and where it would go a little beyond
        the segment's share of a full step: on a GPU a row more is padded to many, so that few are
        better left to the next step. So is what makes a segment longer than the others: they would
        all wait for it, and the prompt's rest has company in the next step, in a steady flow always
        and otherwise where most rows decode.
        """
        segments = self._dealer.segments
        decode_segments = self._dealer.deal_decodes(slots.computed[decodes] + 1)
        later = sum(prefill.left for prefill in prefills)
        lacking = self._dealer.shares(len(decodes) + min(budget, later))
        spare = self._dealer.shares(self._max_rows) - lacking  # of a full step
        lacking -= np.bincount(decode_segments, minlength=segments)
        chunks: list[tuple[int, int, int]] = []  # slot, rows, segment
        admitted: list[tuple[int, Request]] = []
        prefixes: list[Prefix] = []
        rows_left = budget
        least = PADDED_ROWS if is_steady else WORTH_CUTTING
        scored_left = self._max_scored_rows + len(slots.requests) - len(decodes) - len(prefills)
        for prefill in prefills:
            later -= prefill.left
            segment = int(np.argmax(lacking))
            room = prefill.room + (free_pages - prefill.claims) * slots.page_size
            lack = int(lacking[segment])
            rows = min(prefill.left, rows_left, room, max(lack, rows_left - later))
            full = lack + int(spare[segment])
            if full < rows <= full + self._share(self._max_rows) // LITTLE:
                rows = full
            if rows > lack >= least and (is_steady or len(decodes) >= prefill.left):
                rows = lack
            if prefill.is_scored:
                rows = min(rows, scored_left)
                scored_left -= rows
            if rows <= 0:
                break
            if prefill.admission is not None:
                admitted.append((prefill.slot, prefill.admission[0]))
                prefixes.append(prefill.admission[1])
            free_pages -= prefill.claims + max(0, -(-(rows - prefill.room) // slots.page_size))
            rows_left -= rows
            lacking[segment] -= rows
            chunks.append((prefill.slot, rows, segment))
        table = np.array(chunks, np.int64).reshape(-1, 3)
        segment_of = np.concatenate([decode_segments, table[:, 2]])
        order = np.argsort(segment_of, kind="stable")
        return StepPlan(
            preempted=preempted,
            admitted=admitted,
            prefixes=prefixes,
            slots=np.concatenate([decodes, table[:, 0]])[order],
            rows=np.concatenate([np.ones(len(decodes), np.int64), table[:, 1]])[order],
            segment_requests=np.searchsorted(segment_of[order], np.arange(segments + 1)),
            decodes=len(decodes),
            prefill_rows=budget - rows_left,
        )


def _pages_lacking(slots: Slots, takers: Ints) -> Ints:
    """Pages, 0 or 1, that each lacks for its next row."""
    return slots.computed[takers] // slots.page_size + 1 - slots.num_pages[takers]


def _fits(
    slots: Slots, takers: Ints, free_pages: int
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Who gets the page for its next row, the oldest first."""
    lacking = _pages_lacking(slots, takers)
    fits: np.ndarray[tuple[int], np.dtype[np.bool_]] = (lacking == 0) | (
        np.cumsum(lacking) <= free_pages
    )
    return fits


def _running_prefills(slots: Slots, prefilling: Ints) -> list[_Prefill]:
    """Oldest first; each may fill the pages it has and the one for its next row."""
    pages = slots.num_pages[prefilling] + _pages_lacking(slots, prefilling)
    room = pages * slots.page_size - slots.computed[prefilling]
    left = slots.prefill_len[prefilling] - slots.computed[prefilling]
    scored = slots.prompt_logprobs[prefilling] >= 0
    rows = np.stack([prefilling, left, room, scored], axis=1).tolist()
    return [_Prefill(slot, left, room, is_scored=bool(s)) for slot, left, room, s in rows]


def _pages_of_prefills_to_come(slots: Slots, running: Ints) -> int:
    """Pages that running requests still need until they decode, and for their first decode."""
    prefilling = running[slots.computed[running] < slots.prefill_len[running]]
    tokens = np.minimum(slots.prefill_len[prefilling] + 1, slots.max_len[prefilling] - 1)
    return int((slots.pages_for(tokens) - slots.num_pages[prefilling]).sum())
