"""Incremental detokenisation: the text of decoding at once, whole characters, linear time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from nanoflow.loading.gguf_tokenizer import build_tokenizer
from nanoflow.tokenizer import IncrementalDetokenizer, Tokenizer
from tiny_models import byte_level_metadata, sentence_piece_metadata, train_byte_level


def byte_level() -> Tokenizer:
    metadata = byte_level_metadata(train_byte_level(), "smollm")
    metadata["tokenizer.ggml.tokens"] += ["<think>", "<an added one>", "<ä>"]
    metadata["tokenizer.ggml.token_type"] += [4, 4, 3]
    return Tokenizer(build_tokenizer(metadata), special_tokens={"eos_token": "</s>"})


def sentence_piece() -> Tokenizer:
    backend = build_tokenizer(sentence_piece_metadata())
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


def word_piece() -> Tokenizer:
    words = ["[UNK]", "hello", "world", "##s", "##ly", ",", "é", "##京"]
    vocab = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(backend, special_tokens={})


KINDS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: cache(make) for make in (byte_level, sentence_piece, word_piece)
}
# Ids of no token and of special ones are among them; low ids are bytes in sentence_piece.
ids_strategy = st.lists(
    st.one_of(st.integers(0, 9), st.integers(0, 270), st.integers(0, 800)), max_size=40
)


def in_batches(ids: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    batches, begin = [], 0
    for size in sizes:
        batches.append(list(ids[begin : begin + size]))
        begin += size
    return [*batches, *([i] for i in ids[begin:])]


@pytest.mark.parametrize("kind", KINDS)
@given(
    ids=ids_strategy,
    sizes=st.lists(st.integers(0, 5), max_size=10),
    skip=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_whole_text(
    kind: str, ids: list[int], sizes: list[int], skip: bool
) -> None:
    tokenizer = KINDS[kind]()
    stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [stream.push(batch) for batch in in_batches(ids, sizes)]
    assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
@given(
    prompt=st.text(alphabet="the quick, é京😀", max_size=12),
    text=st.text(alphabet="the quick, é京😀", max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_text_follows_its_prompt(kind: str, prompt: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = IncrementalDetokenizer(tokenizer, prompt_ids)
    pieces = [stream.push([i]) for i in ids] + [stream.flush()]
    whole = tokenizer.decode([*prompt_ids, *ids])
    assert tokenizer.decode(prompt_ids) + "".join(pieces) == whole
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_word_after_a_prompt_keeps_its_space() -> None:
    tokenizer = KINDS["sentence_piece"]()
    the = tokenizer.encode("the", add_special_tokens=False)
    assert IncrementalDetokenizer(tokenizer, prompt_ids=tokenizer.encode("and")).push(the) == " the"
    assert IncrementalDetokenizer(tokenizer).push(the) == "the"


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
def test_a_character_is_held_back_until_it_is_whole(kind: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode("😀", add_special_tokens=False)[-4:]
    stream = IncrementalDetokenizer(tokenizer, tokenizer.encode("the"))
    assert [stream.push([i]) for i in ids[:3]] == ["", "", ""]
    after = tokenizer.encode(",", add_special_tokens=False)[-1:]
    assert stream.push([ids[3], *after]) == "😀,"
    stream = IncrementalDetokenizer(tokenizer)
    assert stream.push(ids[:2]) == ""
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_a_character_begun_in_the_prompt_is_given_whole() -> None:
    tokenizer = KINDS["byte_level"]()
    ids = tokenizer.encode("a😀", add_special_tokens=False)
    stream = IncrementalDetokenizer(tokenizer, prompt_ids=ids[:-2])
    assert stream.push(ids[-2:]) == "😀"


@pytest.mark.parametrize("size", [1, 7])
def test_long_runs_of_bytes_are_decoded_once(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """4,000 bytes that form no character, then a word: the work is linear in their number."""
    tokenizer = KINDS["sentence_piece"]()
    decoded = 0
    decode = tokenizer.decode

    def counting(ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", counting)
    run = [tokenizer.backend.token_to_id("<0x80>")] * 4000
    ids = run + tokenizer.encode("the quick", add_special_tokens=False)
    stream = IncrementalDetokenizer(tokenizer)
    text = "".join(stream.push(ids[at : at + size]) for at in range(0, len(ids), size))
    assert text.startswith("\ufffd" * 4000) and text.endswith("quick")
    assert decoded < 3 * len(ids)


def test_a_decoder_of_mixed_kinds_is_refused() -> None:
    backend = train_byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    with pytest.raises(ValueError, match=r"decoder .*'ByteLevel', 'Fuse'.* is not supported"):
        IncrementalDetokenizer(Tokenizer(backend, special_tokens={}))
