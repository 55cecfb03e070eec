"""Tokenizers built from GGUF metadata: against transformers, and against their definition."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from nanoflow.bench.default_model import default_model
from nanoflow.loading.gguf import GgufFile
from nanoflow.loading.gguf_tokenizer import build_tokenizer
from nanoflow.tokenizer import Tokenizer
from tiny_models import (
    byte_level_metadata,
    sentence_piece_metadata,
    tiny_llama,
    train_byte_level,
    write_gguf,
)
from token_cases import CORPUS, WHITE_SPACE_BEFORE_DIGITS, assert_same


@cache
def smollm() -> tuple[Tokenizer, Any]:
    path = default_model()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Tokenizer.from_gguf(GgufFile(path)), theirs


def written(tmp_path: Path, metadata: dict[str, Any]) -> tuple[Tokenizer, Any]:
    """Ours and that of transformers from one GGUF file with this metadata."""
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    write_gguf(
        tmp_path / "t.gguf", tiny_llama(vocab_size=vocab_size, num_layers=1), metadata=metadata
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    return Tokenizer.from_gguf(GgufFile(tmp_path / "t.gguf")), theirs


def test_smollm_is_that_of_transformers() -> None:
    ours, theirs = smollm()
    for text in CORPUS:
        assert_same(ours, theirs, text)
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    assert ours.encode_batch(CORPUS) == [ours.encode(text) for text in CORPUS]
    assert (ours.bos_token_id, ours.eos_token_id, ours.eos_token_ids) == (1, 2, (2,))
    assert ours.vocab_size == 49152
    assert ours.special_ids == set(range(17))


def test_smollm_cuts_digits_apart_before_words() -> None:
    """The published tokenizer isolates digits, so white space before them stays in one piece.

    What transformers builds from a GGUF file leaves that step out.
    """
    ours, theirs = smollm()
    published = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    before = theirs.backend_tokenizer.pre_tokenizer
    theirs.backend_tokenizer.pre_tokenizer = published
    try:
        for text in (*CORPUS, *WHITE_SPACE_BEFORE_DIGITS):
            assert_same(ours, theirs, text)
    finally:
        theirs.backend_tokenizer.pre_tokenizer = before
    assert [ours.decode([i]) for i in ours.encode("a  12")] == ["a", "  ", "1", "2"]


@given(st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=("Cc", "Cs")), max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_survives_smollm(text: str) -> None:
    """Control characters and those from U+40000 on: the vocabulary lacks bytes of theirs."""
    ours, _ = smollm()
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", ["llama-bpe", "llama-v3", "gpt-2", "default"])
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (False, False)])
def test_byte_level_vocabularies(tmp_path: Path, pre: str, bos: bool, eos: bool) -> None:
    flags = {"ggml.add_bos_token": bos, "ggml.add_eos_token": eos}
    ours, theirs = written(tmp_path, byte_level_metadata(train_byte_level(), pre, **flags))
    for text in (*CORPUS, *WHITE_SPACE_BEFORE_DIGITS):
        assert_same(ours, theirs, text)
    ids = ours.encode("the")
    assert (ids[0] == 1, ids[-1] == 2) == (bos, eos)


def test_llama3_adds_bos_and_keeps_words_that_are_tokens_whole() -> None:
    metadata = byte_level_metadata(train_byte_level(), "llama-bpe")
    metadata["tokenizer.ggml.tokens"].append("Unmergeable")
    metadata["tokenizer.ggml.token_type"].append(1)
    tokenizer = build_tokenizer(metadata)
    assert tokenizer.encode("Unmergeable").ids == [1, len(metadata["tokenizer.ggml.tokens"]) - 1]


def test_user_defined_tokens_are_whole_but_not_special() -> None:
    metadata = byte_level_metadata(train_byte_level(), "gpt-2")
    metadata["tokenizer.ggml.tokens"] += ["<think>", "<¦odd▁one¦>"]
    metadata["tokenizer.ggml.token_type"] += [4, 3]
    tokenizer = build_tokenizer(metadata)
    think, odd = tokenizer.get_vocab_size() - 2, tokenizer.get_vocab_size() - 1
    ids = tokenizer.encode("<think>a<¦odd▁one¦>").ids
    assert (ids[0], ids[-1], len(ids)) == (think, odd, 3)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<think>a<¦odd▁one¦>"


@pytest.mark.parametrize("flags", [{}, {"ggml.add_bos_token": False, "ggml.add_eos_token": True}])
def test_sentence_piece_vocabularies(tmp_path: Path, flags: dict[str, Any]) -> None:
    """Where transformers leaves out a space in front, sentence_piece_reference is the judge."""
    ours, theirs = written(tmp_path, sentence_piece_metadata(**flags))
    for text in CORPUS:
        if not text.startswith((" ", "▁")) and "<s>" not in text:
            assert_same(ours, theirs, text)
    assert (ours.encode("the")[0] == 1) == (not flags)


def sentence_piece_reference(metadata: dict[str, Any], text: str) -> list[int]:
    """SentencePiece BPE, plainly: join the best-scored neighbours until none are left."""
    tokens = metadata["tokenizer.ggml.tokens"]
    normal = {t: i for i, t in enumerate(tokens) if metadata["tokenizer.ggml.token_type"][i] == 1}
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in itertools.pairwise(symbols)]
        known = [(scores[normal[t]], -at) for at, t in enumerate(joined) if t in normal]
        if not known:
            break
        at = -max(known)[1]
        symbols[at : at + 2] = [joined[at]]
    ids = []
    for symbol in symbols:
        spelled = [symbol] if symbol in normal else [f"<0x{b:02X}>" for b in symbol.encode()]
        ids += [tokens.index(token) for token in spelled]
    return ids


@cache
def sentence_piece() -> tuple[dict[str, Any], Any]:
    metadata = sentence_piece_metadata(**{"ggml.add_bos_token": False})
    return metadata, build_tokenizer(metadata)


@given(st.text(alphabet="the qunickbrow,ée京😀<0x4>", max_size=40))
@settings(max_examples=200, deadline=None)
def test_sentence_piece_joins_the_best_scored_neighbours(text: str) -> None:
    metadata, tokenizer = sentence_piece()
    if text:
        assert tokenizer.encode(text).ids == sentence_piece_reference(metadata, text)


def test_every_text_has_a_space_in_front() -> None:
    _, tokenizer = sentence_piece()
    assert tokenizer.encode("e").tokens == ["▁", "e"]
    assert "".join(tokenizer.encode(" e").tokens) == "▁▁e"
    assert tokenizer.encode("e</s>e").tokens == ["▁", "e", "</s>", "▁", "e"]
    assert tokenizer.encode("").ids == []
    assert tokenizer.decode(tokenizer.encode("  e").ids) == "  e"


def test_the_space_in_front_can_be_turned_off() -> None:
    metadata = sentence_piece_metadata(
        **{"ggml.add_bos_token": False, "ggml.add_space_prefix": False}
    )
    tokenizer = build_tokenizer(metadata)
    assert tokenizer.encode("the").tokens == ["th", "e"]
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml.model": "bert"}, "model 'bert' is not supported, only gpt2 and llama are"),
        ({"ggml.pre": "tekken"}, "pre 'tekken' is not supported; supported: default, gpt-2"),
        ({"ggml.tokens": []}, "holds no tokenizer"),
        ({"ggml.token_type": [1]}, "token_type has 1 entries for"),
        ({"ggml.merges": ["no such"]}, "inconsistent"),
        ({"ggml.bos_token_id": 10**6}, "bos_token_id=1000000 is no id of"),
        ({"ggml.model": "llama", "ggml.precompiled_charsmap": [1]}, "precompiled_charsmap"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tokenizer(byte_level_metadata(train_byte_level(), "gpt-2", **changes))
    metadata = sentence_piece_metadata(**{"ggml.scores": [0.0]})
    with pytest.raises(ValueError, match="scores has 1 entries for"):
        build_tokenizer(metadata)


def test_smollm_chats_as_transformers_does() -> None:
    ours, theirs = smollm()
    conversations: list[list[dict[str, str]]] = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi <b>&amp;</b> 😀"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "  12  "},
        ],
    ]
    for messages in conversations:
        for prompt in (True, False):
            expected = theirs.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )
            assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected
            ids = ours.apply_chat_template(messages, prompt, tokenize=True)
            assert ids == ours.encode(expected, add_special_tokens=False)
