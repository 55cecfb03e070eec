"""Keys of full pages: equal keys mean equal tokens from the first position to the page's last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from nanoflow.request import Request
from nanoflow.scheduler.pages import PageAllocator
from nanoflow.scheduler.slots import Slots

_KEY_BYTES = 16
ROOT = b""  # before the first page


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the cache holds of a request before it starts."""

    pages: Sequence[int] = ()  # full ones, from the first position on
    num_held: int = 0  # of them, that running requests hold: sharing those takes no free page


class PrefixFinder:
    """Looks for the beginnings of requests in the KV cache, and lets their pages be found."""

    def __init__(self, slots: Slots, pages: PageAllocator) -> None:
        self._slots = slots
        self._pages = pages

    def find(self, request: Request) -> Prefix:
        """Full pages that hold the first tokens of a waiting request: not the last one, whose row
        gives the next token."""
        full = (request.num_tokens - 1) // self._slots.page_size
        if len(request.page_keys) < full:
            tokens = np.concatenate(
                [request.prompt_token_ids, np.array(request.output_token_ids, np.int32)]
            )
            self._extend_keys(request, tokens)
        pages = self._pages.find(request.page_keys[:full])
        return Prefix(pages, self._pages.num_held(pages))

    def register_full_pages(self) -> None:
        """Lets later steps find the pages that the steps ordered so far fill with known tokens."""
        slots = self._slots
        running = slots.running
        full = np.minimum(slots.computed[running], slots.known[running]) // slots.page_size
        more = full > slots.num_shared[running]
        for slot, end in zip(running[more].tolist(), full[more].tolist(), strict=True):
            request = slots.request(slot)
            self._extend_keys(request, slots.tokens[slot, : end * slots.page_size])
            for page in range(int(slots.num_shared[slot]), end):
                self._pages.register(int(slots.pages[slot, page]), request.page_keys[page])
            slots.num_shared[slot] = end

    def _extend_keys(self, request: Request, tokens: NDArray[np.int32]) -> None:
        """Keys for all full pages of a request's tokens."""
        size, keys = self._slots.page_size, request.page_keys
        keys.extend(page_keys(tokens[len(keys) * size :], size, keys[-1] if keys else ROOT))


def page_keys(tokens: NDArray[np.int32], page_size: int, parent: bytes = ROOT) -> Iterator[bytes]:
    """A key for each full page of `tokens`, which follow the page with key `parent`."""
    content, size = tokens.tobytes(), tokens.itemsize * page_size
    for begin in range(0, len(content) - size + 1, size):
        page = content[begin : begin + size]
        parent = blake2b(parent + page, digest_size=_KEY_BYTES).digest()
        yield parent
