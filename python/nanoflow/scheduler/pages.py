"""Who has which page of the KV cache, and what the pages nobody has still hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.int32]


class PageState(IntEnum):
    FREE = 0  # to be granted; may still hold keys and values that are worth finding again
    GRANTED = 1  # one request's keys and values, or several's that begin alike
    RETIRED = 2  # no request's any more, but a step on its way may still read or write it


# As plain numbers: members of an enum are looked up slowly.
_FREE, _GRANTED, _RETIRED = map(int, PageState)


class PageAllocator:
    """Grants pages, and takes them back once no step can touch them. Not thread-safe.

    A retired page carries the number of the last step that uses it and becomes free when that step
    has completed. A page that was registered under a key keeps its content, and can be shared by
    that key, until it is granted anew: pages without a key are granted first, then those whose
    content nobody has wanted for longest.
    """

    def __init__(self, num_pages: int) -> None:
        """Raises ValueError without a page."""
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} but a cache needs at least one page")
        self.num_pages = num_pages
        self.num_retired = 0
        # [num_pages]; the first _num_blank entries are free and hold nothing, the last goes first
        self._blank = np.arange(num_pages, dtype=np.int32)[::-1].copy()
        self._num_blank = num_pages
        self._free_keyed: OrderedDict[int, None] = OrderedDict()  # granted from the beginning on
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._state = np.full(num_pages, _FREE, dtype=np.int8)
        self._users = np.zeros(num_pages, np.int32)  # requests that hold it
        self._last_step = np.zeros(num_pages, np.int64)  # that uses it, of those that let it go
        self._retired: list[tuple[int, Pages]] = []  # (last step, pages)

    @property
    def num_free(self) -> int:
        return self._num_blank + len(self._free_keyed)

    def grant(self, count: int) -> Pages:
        """Takes `count` free pages. Raises ValueError when there are fewer."""
        if not 0 <= count <= self.num_free:
            raise ValueError(f"cannot grant {count} pages, {self.num_free} are free")
        blank = min(count, self._num_blank)
        begin = self._num_blank - blank
        pages = self._blank[begin : self._num_blank].copy()
        self._num_blank = begin
        if blank < count:
            oldest = [self._free_keyed.popitem(last=False)[0] for _ in range(count - blank)]
            for page in oldest:
                del self._page_of[self._key_of.pop(page)]
            pages = np.concatenate([pages, np.array(oldest, np.int32)])
        self._state[pages] = _GRANTED
        self._users[pages] = 1
        self._last_step[pages] = 0
        return pages

    def register(self, page: int, key: bytes) -> None:
        """Makes a granted page, full of what `key` stands for, one that can be found by it."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def use_until(self, page: int, step: int) -> None:
        """Keeps a granted page, once it is given up, until a step has completed."""
        self._last_step[page] = max(self._last_step[page], step)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the first keys, up to one that no page is registered under."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_held(self, pages: Sequence[int]) -> int:
        """How many of these pages requests hold, so that sharing them takes no free one."""
        return int(np.count_nonzero(self._state[list(pages)] == _GRANTED))

    def share(self, pages: Sequence[int]) -> None:
        """Gives pages that find() has named to one more request."""
        for page in pages:
            if self._state[page] == _FREE:
                del self._free_keyed[page]
            elif self._state[page] == _RETIRED:
                self.num_retired -= 1
        self._state[list(pages)] = _GRANTED
        self._users[list(pages)] += 1

    def retire(self, pages: Pages, step: int) -> None:
        """A request gives up pages that its steps up to number `step` use."""
        if len(pages) == 0:
            return
        if not np.all(self._state[pages] == _GRANTED):
            raise ValueError(f"cannot retire pages that are not granted: {pages}")
        users, last = self._users[pages] - 1, np.maximum(self._last_step[pages], step)
        self._users[pages], self._last_step[pages] = users, last
        if users.any():
            pages, last = pages[users == 0], last[users == 0]
        self._state[pages] = _RETIRED
        self.num_retired += len(pages)
        for number in set(last.tolist()):
            self._retired.append((number, pages[last == number]))

    def reclaim(self, completed_step: int) -> None:
        """Frees what was retired with a step number up to `completed_step`."""
        waiting = []
        for step, pages in self._retired:
            # Some may have been shared since, and perhaps retired again with a later step.
            pages = pages[(self._state[pages] == _RETIRED) & (self._last_step[pages] == step)]
            if step > completed_step:
                waiting.append((step, pages))
                continue
            self._state[pages] = _FREE
            self.num_retired -= len(pages)
            self._free(pages)
        self._retired = waiting

    def forget(self) -> None:
        """Lets no page be found any more; those that requests hold stay theirs."""
        keyed = np.array(list(self._free_keyed), np.int32)
        self._free_keyed.clear()
        self._page_of.clear()
        self._key_of.clear()
        self._free(keyed)

    def check_integrity(self) -> None:
        """Asserts that every page is exactly one of free, granted and retired."""
        blank = self._blank[: self._num_blank]
        free = np.concatenate([blank, np.array(list(self._free_keyed), np.int32)])
        retired = np.flatnonzero(self._state == _RETIRED)
        listed = np.concatenate([np.empty(0, np.int32), *(pages for _, pages in self._retired)])
        counts = np.bincount(self._state, minlength=len(PageState))
        assert counts[_FREE] == self.num_free == len(np.unique(free))
        assert counts[_RETIRED] == self.num_retired
        assert np.all(np.isin(retired, listed)), "a retired page would never come back"
        assert np.all(self._state[free] == _FREE)
        assert np.array_equal(self._users > 0, self._state == _GRANTED)
        assert {page: key for key, page in self._page_of.items()} == self._key_of
        assert all(page in self._key_of for page in self._free_keyed)
        assert not any(page in self._key_of for page in blank.tolist())

    def users(self) -> NDArray[np.int32]:
        """[num_pages] How many requests hold each page."""
        return self._users.copy()

    def _free(self, pages: Pages) -> None:
        """Puts pages among the free ones, the last first: a beginning is found more often."""
        if self._key_of:
            listed = pages.tolist()
            keyed = [page for page in reversed(listed) if page in self._key_of]
            self._free_keyed.update(dict.fromkeys(keyed))
            if keyed:
                blank = [page for page in listed if page not in self._key_of]
                pages = np.array(blank, np.int32)
        self._blank[self._num_blank : self._num_blank + len(pages)] = pages
        self._num_blank += len(pages)
