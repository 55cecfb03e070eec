"""Sets of tokens, a bit for each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bits: TypeAlias = NDArray[np.int32]  # [ceil(V / 32)] token t is bit t % 32 of t // 32
_WORD_BITS = 32


def num_words(vocab_size: int) -> int:
    return -(-vocab_size // _WORD_BITS)


def bits_of(tokens: Iterable[int], vocab_size: int) -> Bits:
    """Only these tokens."""
    allowed = np.zeros(num_words(vocab_size) * _WORD_BITS, np.bool_)
    allowed[list(tokens)] = True
    return np.packbits(allowed, bitorder="little").view(np.int32)


def leaves_nothing(bits: Bits, banned: NDArray[np.int32]) -> bool:
    """Whether a set holds no token but banned ones."""
    return not np.any(bits & ~bits_of(banned.tolist(), len(bits) * _WORD_BITS))
