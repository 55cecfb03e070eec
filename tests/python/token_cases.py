"""Texts that tokenizers stumble over, and the comparison with transformers."""

from __future__ import annotations

from typing import Any

from nanoflow.tokenizer import Tokenizer

CORPUS = (
    "",
    " ",
    "Hello, world! I'm sure they'll say it's fine; don't you?",
    "  two leading spaces, and trailing   ",
    "tabs\tand\nnewlines\r\nand\n\n\n  \n several",
    "3.14159 and 1,000,000 in 2024; x=12345y678",
    "naïve café Übergröße, e\u0301 combining, ﬁ ligature",
    "Привет, мир! 你好, 世界。日本語のテキスト 안녕하세요 مرحبا שלום",
    "emoji 😀👍🏽🇺🇸❤️‍🔥 and zero\u200bwidth, nbsp\u00a0here",
    "def f(x: int) -> str:\n    return f'{x ** 2:>8}'  # comment\n\n\tif True:\n\t\tpass",
    '{"key": [1, 2.5e-3, null], "nested": {"a\\"b": "\\u00e9"}}',
    "<|im_start|>user\nhi<|im_end|> <s>text</s>",
    "▁already▁marked ▁ and Ġ as well",
    "aaaaaaaaaaaaaaaa        bbbb",
    "\x00\x07\x1b control \ufffd \U0010ffff",
)
WHITE_SPACE_BEFORE_DIGITS = ("a  12", "\n\n  7", "x =\t\t5", "½ ² ٣ Ⅻ 三", "v1.2  3")


def assert_same(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode(text), text
    plain = ours.encode(text, add_special_tokens=False)
    assert plain == theirs.encode(text, add_special_tokens=False), text
    for skip in (True, False):
        expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == expected
