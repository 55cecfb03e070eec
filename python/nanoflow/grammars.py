"""Structured outputs: which tokens keep a text within a schema, an expression or a grammar.

The work is llguidance's; this is its adapter to our tokenizer and to TokenMask.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

import llguidance
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from nanoflow.structured import StructuredOutputsParams
from nanoflow.token_bits import Bits, bits_of, num_words
from nanoflow.tokenizer import Tokenizer

_KEPT_GRAMMARS = 64  # compiled ones, for requests to come


class GrammarMask:
    """The tokens that a grammar allows next; all of them behind an end of sequence."""

    is_fixed = False

    def __init__(self, matcher: LLMatcher, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        """Raises ValueError, as push() does, where llguidance gives up."""
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._is_complete = False
        self.bits = self._next_bits()

    def push(self, token: int) -> None:
        if self._is_complete:
            return
        self._matcher.consume_token(token)
        self._is_complete = token in self._eos_token_ids
        if self._is_complete:
            self.bits = bits_of(range(self._vocab_size), self._vocab_size)
        else:
            self.bits = self._next_bits()

    def _next_bits(self) -> Bits:
        bits = self._matcher.compute_bitmask()
        _check(self._matcher)
        # llguidance's may end in a word too many.
        return np.frombuffer(bits, np.int32)[: num_words(self._vocab_size)]


class GrammarMaker:
    """Compiles what requests must conform to. Safe to use from several threads."""

    def __init__(
        self, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int], vocab_size: int
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._lock = threading.Lock()  # of what follows
        self._vocabulary: LLTokenizer | None = None  # made when it is needed first
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def make(self, params: StructuredOutputsParams) -> GrammarMask:
        """A mask at the beginning of a text. Raises ValueError on what is no schema, expression or
        grammar, and where the model's vocabulary is not known."""
        grammar = _grammar(params)
        with self._lock:
            matcher = self._compiled.pop(grammar, None) or self._compile(grammar)
            self._compiled[grammar] = matcher
            if len(self._compiled) > _KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
            copy = matcher.deep_copy()
        return GrammarMask(copy, self._eos_token_ids, self._vocab_size)

    def _compile(self, grammar: str) -> LLMatcher:
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        _check(matcher)
        return matcher

    def _make_vocabulary(self) -> LLTokenizer:
        if self._tokenizer is None:
            raise ValueError(
                "structured outputs need the tokenizer that skip_tokenizer_init left out"
            )
        if not self._eos_token_ids:
            raise ValueError(
                "structured outputs need an end-of-sequence token, but the model names none"
            )
        return LLTokenizer(
            self._tokenizer.backend.to_str(),
            n_vocab=self._vocab_size,
            eos_token=list(self._eos_token_ids),
        )


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():  # told with all of its state, which helps nobody here
        raise ValueError(
            f"structured outputs: {matcher.get_error().partition('<state>')[0].strip()}"
        )


def _grammar(params: StructuredOutputsParams) -> str:
    """As llguidance takes it."""
    schema = params.schema
    try:
        if schema is not None:
            return LLMatcher.grammar_from_json_schema(
                schema,
                overrides={
                    "whitespace_flexible": not params.disable_any_whitespace,
                    "whitespace_pattern": params.whitespace_pattern,
                },
            )
        if params.choice is not None:
            return llguidance.grammar_from("choice", json.dumps(list(params.choice)))
        if params.regex is not None:
            return LLMatcher.grammar_from_regex(params.regex)
        assert params.grammar is not None
        return llguidance.grammar_from("grammar", params.grammar)
    except ValueError as error:
        raise ValueError(f"structured outputs: {error}") from error
