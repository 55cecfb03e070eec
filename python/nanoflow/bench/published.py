"""Lengths as in the traces of the NanoFlow paper, drawn from log-normal distributions.

The traces themselves are not public in one form, their means and standard deviations are: table 4
of the paper (OSDI '25), in tokens. A log-normal of the same two moments stands for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from nanoflow.bench.datasets import Lengths


@dataclass(frozen=True, slots=True)
class Moments:
    """Of a length in tokens."""

    mean: float
    std: float

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Log-normal lengths with these moments, rounded, at least 1."""
        variance = math.log1p((self.std / self.mean) ** 2)
        values = rng.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), count)
        return np.maximum(1, np.rint(values)).astype(np.int64)


# name -> (prompt, output)
PUBLISHED: Mapping[str, tuple[Moments, Moments]] = MappingProxyType(
    {
        "splitwise": (Moments(1155, 1109), Moments(211, 163)),
        "lmsys": (Moments(102, 169), Moments(222, 210)),
        "sharegpt-lengths": (Moments(246, 547), Moments(322, 244)),
    }
)

# The paper's harness leaves out requests above these, whatever trace they are from.
FILTER_INPUT, FILTER_OUTPUT, FILTER_TOTAL = 3072, 1024, 4096


def passes_filter(lengths: Lengths) -> bool:
    """Whether the paper's harness would run such a request."""
    return (
        lengths.input <= FILTER_INPUT
        and lengths.output <= FILTER_OUTPUT
        and lengths.input + lengths.output <= FILTER_TOTAL
    )


def published_lengths(
    name: str, count: int, max_total: int, rng: np.random.Generator, *, is_filtered: bool
) -> list[Lengths]:
    """`count` requests of a trace; those longer than `max_total` tokens are drawn anew.

    Raises ValueError when hardly any is short enough.
    """
    prompt, output = PUBLISHED[name]
    found: list[Lengths] = []
    drawn = 0
    while len(found) < count:
        if drawn > 1000 and len(found) < drawn // 1000:
            raise ValueError(f"hardly any request of {name} fits into {max_total} tokens")
        inputs, outputs = prompt.draw(count, rng), output.draw(count, rng)
        drawn += count
        pairs = (Lengths(int(i), int(o)) for i, o in zip(inputs, outputs, strict=True))
        found += [
            one
            for one in pairs
            if one.input + one.output <= max_total and (passes_filter(one) or not is_filtered)
        ]
    return found[:count]
