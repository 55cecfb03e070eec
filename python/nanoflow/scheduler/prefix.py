"""Keys of full pages: equal keys mean equal tokens from the first position to the page's last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_KEY_BYTES = 16
ROOT = b""  # before the first page


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the cache holds of a request before it starts."""

    pages: Sequence[int] = ()  # full ones, from the first position on
    num_held: int = 0  # of them, that running requests hold: sharing those takes no free page


def page_keys(tokens: NDArray[np.int32], page_size: int, parent: bytes = ROOT) -> Iterator[bytes]:
    """A key for each full page of `tokens`, which follow the page with key `parent`."""
    content, size = tokens.tobytes(), tokens.itemsize * page_size
    for begin in range(0, len(content) - size + 1, size):
        page = content[begin : begin + size]
        parent = blake2b(parent + page, digest_size=_KEY_BYTES).digest()
        yield parent
