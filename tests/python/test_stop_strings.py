"""Stop strings in the text of a byte-level tokenizer, however tokens cut it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.detokenizer import IncrementalDetokenizer
from nanoflow.stop_strings import StopStrings
from nanoflow.tokenizer import Tokenizer
from tiny_models import train_byte_level

TOKENIZER = Tokenizer(train_byte_level(), special_tokens={"eos_token": "</s>"})


def tokens_of(pieces: Sequence[str]) -> list[int]:
    """Every piece becomes tokens of its own."""
    return [token for piece in pieces for token in TOKENIZER.encode(piece, False)]


def run(
    pieces: Sequence[str], stops: Sequence[str], min_tokens: int = 0, keep_stop: bool = False
) -> tuple[str, str | None, int]:
    """Text, stop string and tokens taken."""
    watcher = StopStrings(
        IncrementalDetokenizer(TOKENIZER), stops, min_tokens=min_tokens, keep_stop=keep_stop
    )
    tokens = tokens_of(pieces)
    for taken, token in enumerate(tokens, 1):
        stop = watcher.push(token)
        if stop is not None:
            return watcher.text, stop, taken
    return watcher.finish(), None, len(tokens)


@given(
    pieces=st.lists(st.text("ab é京", min_size=1, max_size=3), min_size=1, max_size=8),
    stops=st.lists(st.text("ab é京", min_size=1, max_size=4), min_size=1, max_size=3),
    keep_stop=st.booleans(),
)
def test_the_first_stop_string_ends_the_text(
    pieces: list[str], stops: list[str], keep_stop: bool
) -> None:
    text, stop, taken = run(pieces, stops, keep_stop=keep_stop)
    tokens = tokens_of(pieces)
    seen = IncrementalDetokenizer(TOKENIZER).push(tokens[:taken])
    before = IncrementalDetokenizer(TOKENIZER).push(tokens[: taken - 1])
    if stop is None:
        assert text == "".join(pieces)
        assert not any(candidate in text for candidate in stops)
        return
    assert not any(candidate in before for candidate in stops), "seen too late"
    at = min(seen.index(candidate) for candidate in stops if candidate in seen)
    assert seen.startswith(stop, at)
    assert text == (seen[:at] + stop if keep_stop else seen[:at])


def test_a_stop_string_may_begin_and_end_inside_tokens() -> None:
    assert run(["x", " the", " lazy", " dog"], ["he la"]) == ("x t", "he la", 3)
    assert run(["x", " the", " lazy", " dog"], ["he la"], keep_stop=True)[0] == "x the la"


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (1, "a"), (2, "aa"), (3, "aaa")])
def test_the_first_min_tokens_hold_no_stop_string(min_tokens: int, text: str) -> None:
    assert run(["a", "a", "a"], ["a"], min_tokens)[0] == text


def test_a_stop_string_does_not_reach_back_before_min_tokens() -> None:
    assert run(["a", "b", "c"], ["ab"], min_tokens=1) == ("abc", None, 3)


def test_the_rest_of_a_character_is_given_at_the_end() -> None:
    watcher = StopStrings(IncrementalDetokenizer(TOKENIZER), ["x"], min_tokens=0, keep_stop=False)
    first = TOKENIZER.encode("京", False)[0]
    assert watcher.push(first) is None
    assert watcher.finish() == "\ufffd"
