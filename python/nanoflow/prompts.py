"""The forms a prompt may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

_OWN_VARIABLES = frozenset(
    ("messages", "add_generation_prompt", "tokenize", "chat_template", "continue_final_message")
)
Messages = Sequence[Mapping[str, Any]]  # a conversation: {"role": ..., "content": ...} each
PromptLike: TypeAlias = "str | list[int] | Mapping[str, Any]"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to be tokenised, or token ids."""

    text: str | None = None
    token_ids: Sequence[int] | None = None
    add_special_tokens: bool = True  # a chat template has written them already


def parse_prompts(prompts: PromptLike | Sequence[PromptLike]) -> list[Prompt]:
    """One prompt or several: a text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.

    Raises TypeError on anything else, naming it.
    """
    if isinstance(prompts, str | Mapping) or _is_ids(prompts):
        return [_parse(prompts)]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts are a {type(prompts).__name__}; pass a prompt or a list of them")
    return [_parse(prompt) for prompt in prompts]


def parse_conversations(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """One conversation or several. Raises TypeError, or ValueError on an empty one."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise TypeError(f"messages are a {type(messages).__name__}; pass a list of messages")
    is_one = len(messages) > 0 and isinstance(messages[0], Mapping)
    conversations: list[Any] = [messages] if is_one else list(messages)
    return [parse_conversation(conversation) for conversation in conversations]


def parse_conversation(conversation: Any) -> Messages:
    """With contents as texts: of parts, as OpenAI has them, each is a line, as in vLLM.

    Raises TypeError, or ValueError on no message and on parts that are no texts.
    """
    if not isinstance(conversation, Sequence) or not all(
        isinstance(message, Mapping) for message in conversation
    ):
        raise TypeError('a conversation is a list of messages {"role": ..., "content": ...}')
    if not conversation:
        raise ValueError("a conversation has no messages")
    return [_with_text(message) for message in conversation]


def check_variables(variables: Any) -> Mapping[str, Any]:
    """What is handed to a chat template. Raises TypeError, or ValueError on names of its own."""
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise TypeError(f"chat_template_kwargs={variables!r} must map names to values")
    if own := _OWN_VARIABLES & variables.keys():
        raise ValueError(f"chat_template_kwargs holds {min(own)!r}, which is set otherwise")
    return variables


def _with_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise TypeError(f"a message has role={role!r}; it must be a text such as 'user'")
    if content is None or isinstance(content, str):  # with tool calls there may be none
        return message
    if not isinstance(content, Sequence):
        raise TypeError(f"a message has content={content!r}; it must be a text or a list of parts")
    return {**message, "content": "\n".join(map(_text_of_part, content))}


def _text_of_part(part: Any) -> str:
    match part:
        case str():
            return part
        case {"type": "text", "text": str(text)}:
            return text
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise ValueError(
        f'a message has a part {kind!r}; only texts are understood: {{"type": "text", "text": ...}}'
    )


def check_token_ids(ids: Sequence[int], vocab_size: int, max_model_len: int) -> None:
    """Raises ValueError on what cannot be a prompt of a model."""
    if len(ids) == 0:
        raise ValueError("the prompt is empty; it needs at least one token")
    if len(ids) >= max_model_len:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, but max_model_len is {max_model_len} and a token "
            "must be left to generate; shorten the prompt or raise max_model_len"
        )
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"the prompt holds token id {low if low < 0 else high}, outside the vocabulary of "
            f"{vocab_size} tokens"
        )


def _parse(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if not isinstance(prompt, Mapping):
        return Prompt(token_ids=_checked_ids(prompt))
    unknown = prompt.keys() - {"prompt", "prompt_token_ids"}
    if unknown or len(prompt) == 0:
        what = f"an unknown key {min(map(str, unknown))!r}" if unknown else "no key"
        raise TypeError(f"a prompt has {what}; it takes 'prompt' or 'prompt_token_ids'")
    text = prompt.get("prompt")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"'prompt' is a {type(text).__name__}, not a text")
    if "prompt_token_ids" not in prompt:
        return Prompt(text=text)
    return Prompt(text=text, token_ids=_checked_ids(prompt["prompt_token_ids"]))


def _checked_ids(ids: Any) -> Sequence[int]:
    """As Python integers."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if not isinstance(ids, Sequence) or not all(isinstance(token, Integral) for token in ids):
        raise TypeError(f"a prompt is a {type(ids).__name__}; pass a text or a list of token ids")
    return ids


def _is_ids(prompts: Any) -> bool:
    if hasattr(prompts, "ndim"):
        return bool(prompts.ndim == 1)
    return isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], Integral)
