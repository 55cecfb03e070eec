"""Which tokens samples may take next: of a list, within a grammar, completing no bad word."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

from nanoflow.grammars import GrammarMaker
from nanoflow.request import TokenMask
from nanoflow.sampling_params import SamplingParams
from nanoflow.token_bits import Bits, bits_of
from nanoflow.tokenizer import Tokenizer


class FixedMask:
    """The same for every token."""

    is_fixed = True

    def __init__(self, bits: Bits) -> None:
        self.bits = bits

    def push(self, token: int) -> None:
        """Changes nothing."""


class BadWords:
    """No token that completes one of some sequences. What the prompt ends with does not count."""

    is_fixed = False

    def __init__(self, sequences: Sequence[Sequence[int]], vocab_size: int) -> None:
        """Each of several tokens."""
        self._vocab_size = vocab_size
        self._all = bits_of(range(vocab_size), vocab_size)
        self._lasts: dict[tuple[int, ...], list[int]] = {}  # by the tokens before
        for *before, last in sequences:
            self._lasts.setdefault(tuple(before), []).append(last)
        self._recent: deque[int] = deque(maxlen=max(map(len, self._lasts)))
        self.bits = self._all

    def push(self, token: int) -> None:
        self._recent.append(token)
        recent = tuple(self._recent)
        banned = [
            last
            for before, lasts in self._lasts.items()
            if recent[-len(before) :] == before
            for last in lasts
        ]
        self.bits = self._all & ~bits_of(banned, self._vocab_size) if banned else self._all


class AllOf:
    """What several masks allow."""

    def __init__(self, masks: Sequence[TokenMask]) -> None:
        self._masks = masks
        self.is_fixed = all(mask.is_fixed for mask in masks)

    @property
    def bits(self) -> Bits:
        return reduce(np.bitwise_and, (mask.bits for mask in self._masks))

    def push(self, token: int) -> None:
        for mask in self._masks:
            mask.push(token)


class MaskMaker:
    """Makes the masks of sampling parameters. Safe to use from several threads."""

    def __init__(
        self, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int], vocab_size: int
    ) -> None:
        self._tokenizer = tokenizer
        self._grammars = GrammarMaker(tokenizer, eos_token_ids, vocab_size)
        self._vocab_size = vocab_size

    def make(self, params: SamplingParams) -> Callable[[], TokenMask | None]:
        """What makes a new mask for a sample. Raises ValueError where no token could be sampled, on
        a bad schema or grammar, and on what needs a tokenizer where there is none."""
        sequences = self._bad_sequences(params.bad_words or ())
        single = {sequence[0] for sequence in sequences if len(sequence) == 1}
        longer = [sequence for sequence in sequences if len(sequence) > 1]
        allowed = params.allowed_token_ids
        fixed = None
        if allowed is not None or single:
            tokens = range(self._vocab_size) if allowed is None else allowed
            fixed = bits_of(tokens, self._vocab_size) & ~bits_of(single, self._vocab_size)
            if not np.any(fixed):
                raise ValueError("bad_words leave no token of allowed_token_ids")

        def make_mask() -> TokenMask | None:
            masks: list[TokenMask] = [] if fixed is None else [FixedMask(fixed)]
            if longer:
                masks.append(BadWords(longer, self._vocab_size))
            if params.structured_outputs is not None:
                masks.append(self._grammars.make(params.structured_outputs))
            return AllOf(masks) if len(masks) > 1 else masks[0] if masks else None

        return make_mask

    def _bad_sequences(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """Tokens of each word, at the beginning of a text and behind a space."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in words:
            if self._tokenizer is None:
                raise ValueError("bad_words need the tokenizer that skip_tokenizer_init left out")
            for text in (word.lstrip(), " " + word.lstrip()):
                ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
                if ids and max(ids) >= self._vocab_size:
                    raise ValueError(f"bad_words: {word!r} has a token that the model has not")
                if ids:
                    sequences[ids] = None
        return list(sequences)
