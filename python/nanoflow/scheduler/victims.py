"""Who gives way when pages run out: the request that costs least to resume."""

from __future__ import annotations

import numpy as np

from nanoflow.offload.offload import Offload
from nanoflow.scheduler.pages import PageAllocator
from nanoflow.scheduler.slots import Ints, Slots


class Victims:
    """Knows what running requests would free, and what it would take to bring them back.

    A preempted request loads the pages that the host has and finds those that others hold; it
    computes the rest again. Full pages are on the host already where there is one and where loading
    pays (offload/offload.py), so giving way costs nothing then, only coming back does.
    """

    def __init__(self, slots: Slots, pages: PageAllocator, offload: Offload | None) -> None:
        self._slots = slots
        self._pages = pages
        self._offload = offload

    def choose(self, candidates: Ints) -> tuple[int, int]:
        """One of these running slots, oldest first, and how many pages nobody holds without it.

        Only those with the highest number of priority, the least urgent, may be it. Of them one
        that frees a page, then the one that costs least to resume, then the youngest.
        """
        priority = self._slots.priority[candidates]
        candidates = candidates[priority == priority.max()]
        frees, costs = self._weigh(candidates)
        best = np.lexsort((-np.arange(len(candidates)), costs, frees == 0))[0]
        return int(candidates[best]), int(frees[best])

    def _weigh(self, candidates: Ints) -> tuple[Ints, np.ndarray[tuple[int], np.dtype[np.float64]]]:
        """[R] Pages that each alone holds; [R] what it costs to resume each, in the time of
        computing a token."""
        slots = self._slots
        counts = slots.num_pages[candidates]
        is_held = np.arange(counts.max(initial=0)) < counts[:, None]  # [R, pages]
        table = np.where(is_held, slots.pages[candidates, : is_held.shape[1]], 0)
        is_shared = is_held & (self._pages.users()[table] > 1)
        stay = np.logical_and.accumulate(is_shared, axis=1).sum(axis=1)
        costs = (slots.computed[candidates] - stay * slots.page_size).astype(np.float64)
        for at, slot in enumerate(candidates.tolist()):
            request = slots.request(slot)
            if request.scores_prompt:  # whose rows are all to be computed
                costs[at] = slots.computed[slot]
            elif self._offload is not None:
                keys = request.page_keys[stay[at] : slots.num_shared[slot]]
                pages, tokens = self._offload.load_cost(keys)
                costs[at] += tokens - pages * slots.page_size
        return np.sum(is_held & ~is_shared, axis=1), costs
