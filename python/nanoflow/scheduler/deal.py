"""How the rows of a step are dealt to its segments, the finest nano-batches of the schedule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanoflow.scheduler.slots import Ints


class Dealer:
    """Gives every segment its share of rows and of the KV cache that is read. Stateless."""

    def __init__(self, cuts: Sequence[float], max_decodes: int) -> None:
        """`cuts`: ascending fractions inside (0, 1) that part the segments.

        `max_decodes`: most decode rows of a step. Raises ValueError on other fractions.
        """
        bounds = np.array([0.0, *cuts, 1.0])
        if np.any(np.diff(bounds) <= 0):
            raise ValueError(f"cuts {list(cuts)} must ascend inside (0, 1)")
        self.segments = len(cuts) + 1
        self._bounds = bounds
        self._turns = _round_robin(np.diff(bounds), max_decodes)

    def deal_decodes(self, kv_len: Ints) -> Ints:
        """The segment of each decode, given the keys it reads.

        Segments take turns, in proportion to their shares, at the longest request left: so each
        gets its share of rows within one row, and of keys within the longest request.
        """
        dealt = np.zeros(len(kv_len), np.int64)
        if self.segments > 1:
            dealt[np.argsort(-kv_len, kind="stable")] = self._turns[: len(kv_len)]
        return dealt

    def shares(self, rows: int) -> Ints:
        """Rows of each segment when a step has so many."""
        bounds: Ints = np.rint(self._bounds * rows).astype(np.int64)
        return bounds[1:] - bounds[:-1]


def _round_robin(shares: np.ndarray[tuple[int], np.dtype[np.float64]], turns: int) -> Ints:
    """Whose turn it is: every prefix holds each number in proportion to its share."""
    credit = np.zeros(len(shares))
    order = np.empty(turns, np.int64)
    for turn in range(turns):
        credit += shares
        order[turn] = np.argmax(credit)
        credit[order[turn]] -= 1
    return order
