"""Equal beginnings of requests: computed once, found again by keys of their full pages.

Equal keys mean equal tokens from the first position to the page's last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from nanoflow.offload.offload import Offload
from nanoflow.request import Request
from nanoflow.scheduler.pages import PageAllocator
from nanoflow.scheduler.slots import Slots

_KEY_BYTES = 16
ROOT = b""  # before the first page
PREFETCH_REQUESTS = 16  # next in the queue, for whom pages are read from the SSD


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the cache, and the host pool below it, hold of a request before it starts."""

    pages: Sequence[int] = ()  # full ones, from the first position on
    num_held: int = 0  # of them, that running requests hold: sharing those takes no free page
    slots: Sequence[int] = ()  # of the host pool, with the pages that follow

    @property
    def num_pages(self) -> int:
        """Found, wherever they are."""
        return len(self.pages) + len(self.slots)

    @property
    def claims(self) -> int:
        """Free pages that a request takes with it."""
        return self.num_pages - self.num_held


def page_keys(tokens: NDArray[np.int32], page_size: int, parent: bytes = ROOT) -> Iterator[bytes]:
    """A key for each full page of `tokens`, which follow the page with key `parent`."""
    content, size = tokens.tobytes(), tokens.itemsize * page_size
    for begin in range(0, len(content) - size + 1, size):
        page = content[begin : begin + size]
        parent = blake2b(parent + page, digest_size=_KEY_BYTES).digest()
        yield parent


class PrefixCache:
    """Which pages hold the beginnings of requests. Not thread-safe."""

    def __init__(
        self,
        slots: Slots,
        pages: PageAllocator,
        *,
        is_on: bool,
        offload: Offload | None = None,
    ) -> None:
        """`is_on`: requests that begin alike share the full pages of their beginning.
        `offload`: the tiers that pages are copied to."""
        self.is_on = is_on
        self._slots = slots
        self._pages = pages
        self._offload = offload
        self._filling: set[bytes] = set()  # keys of pages that running requests are to fill

    def prefetch(self, waiting: Iterable[Request]) -> None:
        """Has what only the SSD holds read for those that are next, and keeps what the host has."""
        if self._offload is None:
            return
        for request in islice(waiting, PREFETCH_REQUESTS):
            keys = self._keys(request)
            self._offload.touch(keys)
            if not request.is_prefetched:
                rest = keys[len(self._pages.find(keys)) :]
                request.is_prefetched = self._offload.prefetch(rest)

    def withdraw(self, request: Request) -> None:
        """A request waits no more."""
        if self._offload is not None:
            self._offload.release(request.page_keys)

    def admissible(
        self, waiting: Iterable[Request], most_held_back: int
    ) -> Iterator[tuple[Request, Prefix]]:
        """Those of `waiting` that may start now, in their order, with what the cache holds of them.

        One whose next page another request is about to fill or to load, or would be if it started
        before it, is held back until it can share it, and one whose next page is being read from
        the SSD until it has come. Nobody is looked at behind `most_held_back` of them.
        """
        started: set[bytes] = set()
        held_back = 0
        for request in waiting:
            if not self.is_on or request.scores_prompt:  # whose rows are all to be computed
                yield request, Prefix()
                continue
            keys = self._keys(request)
            found = self._pages.find(keys)
            rest = keys[len(found) :]
            slots = self._offload.find(rest) if self._offload is not None else []
            begins = (*rest[:1], *rest[len(slots) : len(slots) + 1])
            awaits = self._offload is not None and any(map(self._offload.is_awaited, begins))
            if awaits or any(key in self._filling or key in started for key in begins):
                held_back += 1
                if held_back > most_held_back:
                    return
                continue
            yield request, Prefix(found, self._pages.num_held(found), slots)
            started.update(rest)

    def load(self, request: Request, prefix: Prefix) -> Sequence[int]:
        """The pages that an admitted request starts with. Those that follow what the device holds
        are filled by the host before the next step."""
        if self._offload is None:
            return prefix.pages
        size, resumes = self._slots.page_size, request.num_preemptions > 0
        begin, end = len(prefix.pages), prefix.num_pages
        sought, found = request.num_tokens - begin * size, (end - begin) * size
        self._offload.touch(request.page_keys[:begin])
        pages: list[int] = self._pages.grant(end - begin).tolist()
        for page, key in zip(pages, request.page_keys[begin:end], strict=True):
            self._pages.register(page, key)
        self._offload.load(prefix.slots, pages, sought=sought, found=found, resumes=resumes)
        self.withdraw(request)
        return [*prefix.pages, *pages]

    def admit(self, slot: int) -> None:
        """A request has got a slot and starts with the pages found."""
        if self.is_on:
            first = int(self._slots.num_shared[slot])
            self._filling.update(self._keys(self._slots.request(slot))[first:])

    def release(self, slot: int) -> None:
        """A running request is about to give up its pages."""
        if not self.is_on:
            return
        keys = self._slots.request(slot).page_keys
        self._filling.difference_update(keys[int(self._slots.num_shared[slot]) :])
        if self._offload is not None:
            self._offload.touch(keys)

    def register_full_pages(self, step: int) -> None:
        """Lets later steps find the pages that the steps up to this one fill with known tokens."""
        slots = self._slots
        if not self.is_on:
            return
        running = slots.running
        full = np.minimum(slots.computed[running], slots.known[running]) // slots.page_size
        shared = slots.num_shared[running]
        more = full > shared
        ranges = np.stack([running[more], shared[more], full[more]], axis=1).tolist()
        for slot, begin, end in ranges:
            keys = slots.request(slot).page_keys
            if len(keys) < end:
                self._extend(keys, slots.tokens[slot, : end * slots.page_size])
            pages = slots.pages[slot, begin:end].tolist()
            for page, key in zip(pages, keys[begin:end], strict=True):
                self._pages.register(page, key)
                self._filling.discard(key)
                if self._offload is not None and self._offload.store(page, key):
                    self._pages.use_until(page, step + 1)
            slots.num_shared[slot] = end

    def _keys(self, request: Request) -> list[bytes]:
        """Of the full pages of what is known of a request; not of the last one, whose row gives
        the next token."""
        full = (request.num_tokens - 1) // self._slots.page_size
        if len(request.page_keys) < full:
            tokens = np.concatenate(
                [request.prompt_token_ids, np.array(request.output_token_ids, np.int32)]
            )
            self._extend(request.page_keys, tokens)
        return request.page_keys[:full]

    def _extend(self, keys: list[bytes], tokens: NDArray[np.int32]) -> None:
        """Keys for all full pages of a request's tokens."""
        size = self._slots.page_size
        keys.extend(page_keys(tokens[len(keys) * size :], size, keys[-1] if keys else ROOT))
