"""Text as it is generated: token ids in, whole characters out."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanoflow.tokenizer import Tokenizer

_CONTEXT_BYTES = 4  # a UTF-8 character is no longer


def _byte_of_character() -> Mapping[str, int]:
    """The alphabet of byte-level vocabularies, as GPT-2 has it.

    Printable Latin-1 characters stand for themselves, those from U+0100 on for all other bytes.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return MappingProxyType(alphabet | {chr(256 + n): byte for n, byte in enumerate(others)})


BYTE_OF_CHARACTER: Mapping[str, int] = _byte_of_character()


class IncrementalDetokenizer:
    """The text of one generation, token by token, as decoding all of it at once would give it.

    A character whose bytes lie in several tokens is held back until it is complete. Each token is
    decoded a bounded number of times. Not safe to use from several threads at once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        """`prompt_ids`: what the generated tokens follow, so that "▁world" becomes " world".

        Raises ValueError on a decoder that mixes byte-level steps with others.
        """
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stream: _ByteStream | _PieceStream
        if "ByteLevel" not in tokenizer.decoder_types:
            self._stream = _PieceStream(tokenizer)
        elif set(tokenizer.decoder_types) == {"ByteLevel"}:
            self._stream = _ByteStream(tokenizer)
        else:
            raise ValueError(f"the tokenizer's decoder {tokenizer.decoder_types} is not supported")
        self._stream.set_context(token for token in reversed(prompt_ids) if self._is_kept(token))

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next tokens and gives the text that is now certain."""
        return self._stream.push([token for token in ids if self._is_kept(token)])

    def flush(self) -> str:
        """At the end of a generation: what is left of a character that was never completed."""
        return self._stream.flush()

    def _is_kept(self, token: int) -> bool:
        return token not in self._skipped


class _ByteStream:
    """Byte-level vocabularies: a token is bytes, text is their UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def set_context(self, reversed_ids: Iterable[int]) -> None:
        """A character begun at the end of the prompt is given whole once it is complete."""
        tail: deque[bytes] = deque()
        for token in reversed_ids:
            tail.appendleft(self._token_bytes(token))
            if sum(map(len, tail)) >= _CONTEXT_BYTES:
                break
        self._decoder.decode(b"".join(tail))

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self._token_bytes, ids)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _PieceStream:
    """Other vocabularies: a token is text, or one byte of a run of byte tokens.

    The decoder judges a run of bytes as a whole, so a run is held back until it ends. A piece is
    decoded once behind the piece before it, which tells the decoder that it is not the first, and
    once before the piece after it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the last piece whose text was given, and no byte token
        self._pending: list[int] = []

    def set_context(self, reversed_ids: Iterable[int]) -> None:
        for token in reversed_ids:
            self._context.insert(0, token)
            if self._is_piece(token):
                break

    def push(self, ids: Sequence[int]) -> str:
        ids = [token for token in ids if self._tokenizer.backend.id_to_token(token) is not None]
        pieces = [at for at, token in enumerate(ids) if self._is_piece(token)]
        if not pieces:
            self._pending += ids
            return ""
        settled = self._pending + ids[: pieces[-1] + 1]
        self._pending = ids[pieces[-1] + 1 :]
        return self._give(settled)

    def flush(self) -> str:
        settled, self._pending = self._pending, []
        return self._give(settled) if settled else ""

    def _give(self, settled: list[int]) -> str:
        known = self._tokenizer.decode(self._context, skip_special_tokens=False)
        text = self._tokenizer.decode(self._context + settled, skip_special_tokens=False)
        self._context = settled[-1:]
        return text[len(known) :]

    def _is_piece(self, token: int) -> bool:
        return token not in self._tokenizer.byte_token_ids
