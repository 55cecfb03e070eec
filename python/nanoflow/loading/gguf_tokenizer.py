"""Builds a `tokenizers.Tokenizer` from the metadata of a GGUF file.

Two vocabularies are known: "gpt2" (byte-level BPE, with merges) and "llama" (SentencePiece BPE,
whose merges follow from the scores of its pieces).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

_SPACE = "\u2581"  # how SentencePiece writes a space


class TokenType(IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1  # made by merges
    UNKNOWN = 2  # stands for what the vocabulary cannot spell
    CONTROL = 3  # a special token, found in text as a whole, left out when decoding
    USER_DEFINED = 4  # found in text as a whole, kept when decoding
    UNUSED = 5
    BYTE = 6  # <0xAB>, one byte of a character without a piece of its own


@dataclass(frozen=True, slots=True)
class _BytePreTokenizer:
    """How a family of byte-level vocabularies cuts text before merging."""

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    ignore_merges: bool = False  # a word that is a token stays whole, whatever the merges say
    add_bos: bool = False  # when the file does not say


# Words with one leading non-letter, up to three digits, punctuation with its newlines, white space.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_pre_tokenizers() -> Mapping[str, _BytePreTokenizer]:
    gpt2 = _BytePreTokenizer((pre_tokenizers.ByteLevel(add_prefix_space=False),))
    smollm = _BytePreTokenizer((pre_tokenizers.Digits(individual_digits=True), *gpt2.steps))
    llama3 = _BytePreTokenizer(
        (
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ),
        ignore_merges=True,
        add_bos=True,
    )
    return MappingProxyType(
        {
            "default": gpt2,
            "gpt-2": gpt2,
            "smollm": smollm,
            "llama-bpe": llama3,
            "llama3": llama3,
            "llama-v3": llama3,
        }
    )


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer a GGUF file describes, adding BOS and EOS as the file asks for.

    Raises ValueError naming a kind of vocabulary or of pre-tokenizer that is not supported, or
    metadata that are missing or contradict each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError("the GGUF file holds no tokenizer: it lacks tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens"
        )
    try:
        if kind == "gpt2":
            tokenizer, add_bos = _byte_level(metadata, tokens)
        elif kind == "llama":
            tokenizer, add_bos = _sentence_piece(metadata, tokens, types)
        else:
            raise ValueError(
                f"tokenizer.ggml.model {kind!r} is not supported, only gpt2 and llama are"
            )
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises plain Exception, e.g. on a merge of no tokens
        raise ValueError(f"the tokenizer of the GGUF file is inconsistent: {error}") from error
    _add_whole_tokens(tokenizer, tokens, types)
    _add_bos_and_eos(tokenizer, metadata, tokens, add_bos)
    return tokenizer


def special_token_id(metadata: Mapping[str, Any], role: str) -> int | None:
    """Id of the "bos", "eos", "unknown" or "padding" token."""
    default = None
    if metadata.get("tokenizer.ggml.model") == "llama":  # SentencePiece's own defaults
        default = {"unknown": 0, "bos": 1, "eos": 2}.get(role)
    token_id: int | None = metadata.get(f"tokenizer.ggml.{role}_token_id", default)
    size = len(metadata["tokenizer.ggml.tokens"])
    if token_id is not None and not 0 <= token_id < size:
        raise ValueError(f"tokenizer.ggml.{role}_token_id={token_id} is no id of {size} tokens")
    return token_id


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    known = _byte_pre_tokenizers()
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in known:
        raise ValueError(
            f"tokenizer.ggml.pre {name!r} is not supported; supported: {', '.join(known)}"
        )
    if "tokenizer.ggml.merges" not in metadata:
        raise ValueError("the GGUF file lacks tokenizer.ggml.merges")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_split_merges(metadata["tokenizer.ggml.merges"]),
            ignore_merges=known[name].ignore_merges,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(known[name].steps))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, known[name].add_bos


def _sentence_piece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tuple[Tokenizer, bool]:
    if "tokenizer.ggml.precompiled_charsmap" in metadata:
        raise ValueError("tokenizer.ggml.precompiled_charsmap is not supported")
    if "tokenizer.ggml.merges" in metadata:
        merges = _split_merges(metadata["tokenizer.ggml.merges"])
    else:
        scores = metadata.get("tokenizer.ggml.scores", ())
        if len(scores) != len(tokens):
            raise ValueError(
                f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens"
            )
        merges = _merges_from_scores(tokens, types, scores)
    unknown = special_token_id(metadata, "unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    # As SentencePiece: also in front of a space, and of text behind a special token.
    prefix = [normalizers.Prepend(_SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


def _split_merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    return pairs


def _merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """All pairs of pieces that join to a piece, best score first.

    SentencePiece joins the neighbours whose joint piece has the highest score; ranked merges do the
    same. Only normal pieces are ever made by joining. Equal scores are ordered as in transformers.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind != TokenType.NORMAL:
            continue
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        ranked += [((-score, -len(left), -len(right)), (left, right)) for left, right in pairs]
    ranked.sort(key=lambda entry: entry[0])
    return [pair for _, pair in ranked]


def _add_whole_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Tokens that are looked for in the text before anything else; they keep their ids."""
    special, plain = [], []
    for token, kind in zip(tokens, types, strict=True):
        if kind == TokenType.CONTROL:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == TokenType.USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_bos_and_eos(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str], add_bos: bool
) -> None:
    template, special_tokens = ["$A"], []
    bos, eos = special_token_id(metadata, "bos"), special_token_id(metadata, "eos")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", add_bos):
        template.insert(0, tokens[bos])
        special_tokens.append((tokens[bos], bos))
    if eos is not None and metadata.get("tokenizer.ggml.add_eos_token", False):
        template.append(tokens[eos])
        special_tokens.append((tokens[eos], eos))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(dict.fromkeys(special_tokens))
    )
