"""Text <-> token ids, chat prompts, and text as it is generated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import tokenizers
from tokenizers import AddedToken, processors

from nanoflow.detokenizer import BYTE_OF_CHARACTER, IncrementalDetokenizer
from nanoflow.loading.chat_template import ChatTemplate
from nanoflow.loading.gguf import GgufFile
from nanoflow.loading.gguf_config import token_ids
from nanoflow.loading.gguf_tokenizer import build_tokenizer, special_token_id

__all__ = ["IncrementalDetokenizer", "Tokenizer"]


class Tokenizer:
    """A tokenizer of the `tokenizers` library with its special tokens and chat template.

    Safe to use from several threads.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        """`special_tokens`: text by role (bos_token, eos_token, unk_token, pad_token).

        `eos_token_ids`: further tokens that end a generation.
        """
        backend.no_truncation()  # a tokenizer.json may carry the settings of its training
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.pad_token_id = self._special_id("pad_token")
        ends = (self.eos_token_id, *eos_token_ids)
        self.eos_token_ids = tuple(dict.fromkeys(end for end in ends if end is not None))
        self.special_ids = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._chat_template = None if chat_template is None else ChatTemplate(chat_template)
        decoder = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        self.decoder_types = tuple(_decoder_types(decoder))
        bytes_of_runs = map(backend.token_to_id, map("<0x{:02X}>".format, range(256)))
        self.byte_token_ids = (
            frozenset(i for i in bytes_of_runs if i is not None)
            if "ByteFallback" in self.decoder_types
            else frozenset()
        )
        self._token_bytes: dict[int, bytes] = {}  # of the tokens seen so far

    @classmethod
    def from_source(cls, source: Path | GgufFile) -> Tokenizer:
        """From `Checkpoint.tokenizer_source`: a directory or an open GGUF file."""
        return cls.from_gguf(source) if isinstance(source, GgufFile) else cls.from_dir(source)

    @classmethod
    def from_gguf(cls, file: GgufFile) -> Tokenizer:
        """From the metadata of a GGUF file. Raises ValueError naming the file and what it lacks."""
        metadata = file.metadata
        try:
            backend = build_tokenizer(metadata)
            roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
            ids = {f"{name}_token": special_token_id(metadata, r) for r, name in roles.items()}
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from error
        tokens = metadata["tokenizer.ggml.tokens"]
        ends = token_ids(metadata).get("eos_token_id", [])
        return cls(
            backend,
            special_tokens={role: tokens[i] for role, i in ids.items() if i is not None},
            eos_token_ids=[ends] if isinstance(ends, int) else ends,
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    @classmethod
    def from_dir(cls, directory: Path) -> Tokenizer:
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja of a directory.

        Raises FileNotFoundError without a tokenizer.json, ValueError when it is corrupt.
        """
        path = directory / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{directory} has no tokenizer.json; transformers' AutoTokenizer can save one"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path} is not a valid tokenizer: {error}") from error
        config_path = directory / "tokenizer_config.json"
        try:
            config = json.loads(config_path.read_bytes()) if config_path.exists() else {}
        except ValueError as error:
            raise ValueError(f"{config_path} is not valid JSON: {error}") from error
        special_tokens = {
            role: value["content"] if isinstance(value, dict) else value
            for role in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (value := config.get(role)) is not None
        }
        backend.add_special_tokens(
            [AddedToken(t, normalized=False, special=True) for t in special_tokens.values()]
        )
        _set_bos_and_eos(backend, config, special_tokens)
        template_path = directory / "chat_template.jinja"
        template = config.get("chat_template")
        if template_path.exists():
            template = template_path.read_text(encoding="utf-8")
        elif isinstance(template, list):
            template = {t["name"]: t["template"] for t in template}.get("default")
        return cls(backend, special_tokens=special_tokens, chat_template=template)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens spelled out in it become their ids."""
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of several texts, on several threads."""
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in encoded]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that are no token are left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tokenize: Literal[False] = False,
        **variables: Any,
    ) -> str: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tokenize: Literal[True],
        **variables: Any,
    ) -> list[int]: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        *,
        chat_template: ChatTemplate | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """The prompt of a conversation, as text or as ids.

        `chat_template`: instead of the model's own. `continue_final_message`: the prompt ends as
        the last message does, without what a template puts behind it. `variables` are handed to
        the template. Raises ValueError without a chat template, or when the template refuses the
        messages, and on a last message that cannot be continued.
        """
        template = chat_template or self._chat_template
        if template is None:
            raise ValueError(
                "this model has no chat template: pass prompts as text, give a chat_template, or "
                "use a chat model"
            )
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message=True needs add_generation_prompt=False: the next words are "
                "of the last message, or of a new one"
            )
        prompt = template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            variables=variables,
        )
        if continue_final_message:
            prompt = _up_to(prompt, messages[-1].get("content"))
        return self.encode(prompt, add_special_tokens=False) if tokenize else prompt

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token of a byte-level vocabulary stands for; empty for an id without one."""
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self.backend.id_to_token(token_id) or ""
            try:
                known = bytes(BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token, spelled as it is
                known = str(token).encode()
            self._token_bytes[token_id] = known
        return known

    def _special_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)


def _up_to(prompt: str, content: Any) -> str:
    """A prompt as far as the content of its last message, which templates strip or not."""
    for text in (content, content.strip()) if isinstance(content, str) else ():
        begin = prompt.rfind(text)
        if text and begin >= 0:
            return prompt[: begin + len(text)]
    raise ValueError(
        f"the last message's content {content!r} is not found in what the chat template makes of "
        "it, and cannot be continued"
    )


def _decoder_types(decoder: Mapping[str, Any]) -> list[str]:
    """Names of a decoder's steps, with nested sequences laid flat."""
    if decoder.get("type") == "Sequence":
        return [name for step in decoder["decoders"] for name in _decoder_types(step)]
    return [decoder["type"]] if decoder else []


def _set_bos_and_eos(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Lets add_bos_token and add_eos_token of a tokenizer_config.json overrule tokenizer.json."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos = special_tokens.get("bos_token") if config.get("add_bos_token") else None
    eos = special_tokens.get("eos_token") if config.get("add_eos_token") else None
    used = [token for token in dict.fromkeys((bos, eos)) if token is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=[token for token in (bos, "$A", eos) if token is not None],
        special_tokens=[(token, backend.token_to_id(token)) for token in used],
    )
