"""Who has which page of the KV cache."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class PageState(IntEnum):
    FREE = 0  # in the free stack
    GRANTED = 1  # a request's keys and values
    RETIRED = 2  # no request's any more, but a step on its way may still read or write it


class PageAllocator:
    """Grants pages, and takes them back once no step can touch them. Not thread-safe.

    A retired page carries the number of the last step that uses it and becomes free when that step
    has completed.
    """

    def __init__(self, num_pages: int) -> None:
        """Raises ValueError without a page."""
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} but a cache needs at least one page")
        self.num_pages = num_pages
        self.num_free = num_pages
        self.num_retired = 0
        # [num_pages]; the first num_free entries are free, the last of them is granted first
        self._free = np.arange(num_pages, dtype=np.int32)[::-1].copy()
        self._state = np.full(num_pages, PageState.FREE, dtype=np.int8)
        self._retired: list[tuple[int, NDArray[np.int32]]] = []  # (last step, pages)

    def grant(self, count: int) -> NDArray[np.int32]:
        """Takes `count` free pages. Raises ValueError when there are fewer."""
        if not 0 <= count <= self.num_free:
            raise ValueError(f"cannot grant {count} pages, {self.num_free} are free")
        begin = self.num_free - count
        pages = self._free[begin : self.num_free].copy()
        self.num_free = begin
        self._state[pages] = PageState.GRANTED
        return pages

    def retire(self, pages: NDArray[np.int32], step: int) -> None:
        """Gives up granted pages that steps up to number `step` use."""
        if len(pages) == 0:
            return
        if not np.all(self._state[pages] == PageState.GRANTED):
            raise ValueError(f"cannot retire pages that are not granted: {pages}")
        self._state[pages] = PageState.RETIRED
        self.num_retired += len(pages)
        self._retired.append((step, pages.copy()))

    def reclaim(self, completed_step: int) -> None:
        """Frees what was retired with a step number up to `completed_step`."""
        waiting = []
        for step, pages in self._retired:
            if step > completed_step:
                waiting.append((step, pages))
                continue
            self._free[self.num_free : self.num_free + len(pages)] = pages
            self._state[pages] = PageState.FREE
            self.num_free += len(pages)
            self.num_retired -= len(pages)
        self._retired = waiting

    def check_integrity(self) -> None:
        """Asserts that every page is exactly one of free, granted and retired."""
        free = self._free[: self.num_free]
        retired = np.concatenate([np.empty(0, np.int32), *(pages for _, pages in self._retired)])
        counts = np.bincount(self._state, minlength=len(PageState))
        assert counts[PageState.FREE] == self.num_free == len(np.unique(free))
        assert counts[PageState.RETIRED] == self.num_retired == len(np.unique(retired))
        assert np.all(self._state[free] == PageState.FREE)
        assert np.all(self._state[retired] == PageState.RETIRED)

    def granted(self) -> NDArray[np.int32]:
        """The pages that requests hold, ascending."""
        return np.flatnonzero(self._state == PageState.GRANTED).astype(np.int32)
