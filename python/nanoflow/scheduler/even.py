"""How many rows of prompts a step takes in a steady flow."""

from __future__ import annotations

import math
import sys

TILE_ROWS = 256  # to multiples of which steps keep: whole tiles in each of two halves
FEW_DECODES = 128  # beside fewer, a prompt that takes its time keeps too large a share of them away
SLACK = 1.1  # times the pace: prompts that are longer for once do not hold up those behind them
SOON = 4  # steps in which what could be prefilled now is to be


def prefill_rows(decodes: int, left: int, pace: float, segments: int) -> int:
    """At most so many beside `decodes` rows, while requests wait for others to end: `left` rows of
    prompts have begun or could begin, and `pace` rows a step begin on average.

    Steps that take prompts as they come have as many rows as prompts happened to begin: some are
    long, some read all weights for the decodes alone. Here all get what a step needs on average, in
    whole tiles of a GPU's products unless those leave prompts less than half of it. Where that is
    less than the average, somewhat fewer requests come to run, and a step is that much shorter;
    where it is more, prompts run out now and then. Segments need several prompts at a time to be
    even, so with several of them it is never more. Without a pace, or with few decodes, there is no
    limit.
    """
    if math.isinf(pace) or decodes < FEW_DECODES:
        return sys.maxsize
    pace = max(SLACK * pace, left / SOON)
    rows = math.ceil(decodes + pace)
    tiled = round(rows / TILE_ROWS) * TILE_ROWS
    if tiled - decodes >= pace / 2 and (segments == 1 or tiled < rows):
        rows = tiled
    return rows - decodes
