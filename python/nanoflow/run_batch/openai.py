"""OpenAI's completions and chat completions: bodies of requests in, bodies of answers out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nanoflow.outputs import CompletionOutput, Logprob, RequestOutput
from nanoflow.prompts import check_variables, parse_conversation
from nanoflow.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.structured import parse_structured
from nanoflow.tokenizer import Tokenizer

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
_OWN = (
    "output_kind",
    "detokenize",
    "logprobs",
    "prompt_logprobs",
    "extra_args",
    "structured_outputs",
)
_PARAMS = frozenset(field.name for field in fields(SamplingParams)) - set(_OWN)
_CHAT_TEMPLATE = ("messages", "chat_template_kwargs", "add_generation_prompt")
_CHAT = frozenset((*_CHAT_TEMPLATE, "max_completion_tokens", "logprobs", "top_logprobs"))
_COMPLETIONS = frozenset(("prompt", "logprobs", "echo"))
_FORMATS = frozenset(("structured_outputs", "response_format"))
# What changes nothing here, and what may not be asked for.
_IGNORED = frozenset(("model", "user", "metadata", "store", "service_tier", "stream_options"))
_FORMAT = frozenset(("response_format",))
_OFF = frozenset(("stream", "echo"))


@dataclass(frozen=True, slots=True)
class Work:
    """What a request comes to: prompts, which are run with the same parameters."""

    url: str
    prompts: Sequence[Any]  # as generate() takes them
    params: SamplingParams


def parse_body(
    url: str, body: Mapping[str, Any], defaults: SamplingParams, tokenizer: Tokenizer | None
) -> Work:
    """Raises ValueError or TypeError naming what is wrong. `defaults`: the model's own."""
    is_chat = url == CHAT_URL
    known = _PARAMS | _IGNORED | _OFF | _FORMAT | _FORMATS | (_CHAT if is_chat else _COMPLETIONS)
    for name, value in body.items():
        if name not in known:
            raise ValueError(f"{url} has no parameter {name!r} here")
        if name in _OFF and value:
            raise ValueError(f"{name}={value!r} is not supported in a batch")
    params = defaults
    params.output_kind = RequestOutputKind.FINAL_ONLY
    if is_chat:
        params.max_tokens = None  # as far as the context goes
    for name in _PARAMS & body.keys():
        if body[name] is not None:
            setattr(params, name, body[name])
    if isinstance(body.get("logit_bias"), dict):
        params.logit_bias = _by_number(body["logit_bias"])
    if is_chat:
        if body.get("max_completion_tokens") is not None:
            params.max_tokens = body["max_completion_tokens"]
        if body.get("logprobs"):
            params.logprobs = body.get("top_logprobs") or 0
    else:
        params.logprobs = body.get("logprobs")
    params.structured_outputs = parse_structured(body)
    params.check()
    return Work(url, _chat(body, tokenizer) if is_chat else _prompts(body), params)


def _by_number(bias: Mapping[str, float]) -> dict[int, float]:
    """With numbers as keys, where JSON has texts."""
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        raise ValueError(f"logit_bias={bias!r} must map token ids to numbers") from error


def _chat(body: Mapping[str, Any], tokenizer: Tokenizer | None) -> list[Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message")
    if tokenizer is None:
        raise ValueError("chats need a tokenizer, which skip_tokenizer_init=True left out")
    text = tokenizer.apply_chat_template(
        parse_conversation(messages),
        add_generation_prompt=body.get("add_generation_prompt", True),
        **check_variables(body.get("chat_template_kwargs")),
    )
    assert isinstance(text, str)
    return [{"prompt_token_ids": tokenizer.encode(text, False)}]


def _prompts(body: Mapping[str, Any]) -> list[Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, str) or (
        isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt)
    ):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        return prompt
    raise ValueError("prompt must be a text, a list of token ids, or a list of these")


def make_body(work: Work, outputs: Sequence[RequestOutput], name: str, model: str) -> Any:
    """The answer: choices of the first prompt, then of the others. `name` makes its id."""
    is_chat = work.url == CHAT_URL
    completions = [one for output in outputs for one in output.outputs]
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(len(one.token_ids) for one in completions)
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": index,
                **({"message": _message(one)} if is_chat else {"text": one.text}),
                "logprobs": (_chat_logprobs if is_chat else _logprobs)(one),
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
            }
            for index, one in enumerate(completions)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated,
        },
    }


def _message(completion: CompletionOutput) -> dict[str, str]:
    return {"role": "assistant", "content": completion.text}


def _text(token: int, entry: Logprob) -> str:
    return f"token_id:{token}" if entry.decoded_token is None else entry.decoded_token


def _chat_logprobs(completion: CompletionOutput) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None

    def entry(token: int, found: Logprob) -> dict[str, Any]:
        text = _text(token, found)
        return {"token": text, "logprob": found.logprob, "bytes": list(text.encode())}

    content = []
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        top = [entry(other, found) for other, found in entries.items()]
        top.sort(key=lambda one: -one["logprob"])
        content.append({**entry(token, entries[token]), "top_logprobs": top})
    return {"content": content}


def _logprobs(completion: CompletionOutput) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    of_each = list(zip(completion.token_ids, completion.logprobs, strict=True))
    tokens = [_text(token, entries[token]) for token, entries in of_each]
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [entries[token].logprob for token, entries in of_each],
        "top_logprobs": [
            {_text(other, found): found.logprob for other, found in entries.items()}
            for _, entries in of_each
        ],
        "text_offset": offsets[:-1],
    }
