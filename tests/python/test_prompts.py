"""Conversations: what a message may be, and what each wrong one says."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow.prompts import check_variables, parse_conversations


def test_parts_of_a_content_are_its_lines() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}, "you"]
    called: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"id": "3"}]}
    [messages] = parse_conversations([{"role": "user", "content": parts, "name": "Ann"}, called])
    assert messages == [{"role": "user", "content": "hel\nlo\nyou", "name": "Ann"}, called]
    assert len(parse_conversations([messages] * 3)) == 3


@pytest.mark.parametrize(
    ("message", "error", "what"),
    [
        ("hello", TypeError, "a conversation is a list of messages"),
        ({"content": "x"}, TypeError, "role=None; it must be a text such as 'user'"),
        ({"role": "user", "content": 5}, TypeError, "content=5; it must be a text or a list"),
        ({"role": "user", "content": [{"type": "image"}]}, ValueError, "part 'image'; only texts"),
        ({"role": "user", "content": [{"type": "text"}]}, ValueError, "part 'text'; only texts"),
        ({"role": "user", "content": [7]}, ValueError, "part 7; only texts"),
    ],
)
def test_what_is_no_message_is_named(message: Any, error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        parse_conversations([[message]])


def test_what_a_template_may_not_be_given_is_named() -> None:
    assert check_variables(None) == {} and check_variables({"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="chat_template_kwargs holds 'messages'"):
        check_variables({"messages": []})
    for wrong in (3, {3: 1}):
        with pytest.raises(TypeError, match="must map names to values"):
            check_variables(wrong)
