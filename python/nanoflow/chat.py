"""A chat with a model in the terminal."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from nanoflow.arguments import add_engine_arguments
from nanoflow.bench.default_model import llm_arguments
from nanoflow.llm import LLM
from nanoflow.sampling_params import SamplingParams

HELP = "/exit ends, /clear forgets the conversation, Ctrl-C stops an answer"


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_chat)
    parser.add_argument("--system-prompt", help="what the model is told before the conversation")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: 512)")
    parser.add_argument("--temperature", type=float, help="default: the model's own, else 1.0")
    parser.add_argument("--top-p", type=float, help="default: the model's own, else 1.0")
    add_engine_arguments(parser)


def run_chat(options: argparse.Namespace) -> None:
    arguments = llm_arguments(options)
    with LLM(**arguments) as llm:
        params = llm.get_default_sampling_params()
        params.max_tokens = options.max_tokens
        for name in ("temperature", "top_p"):
            if getattr(options, name) is not None:
                setattr(params, name, getattr(options, name))
        params.check()
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() a history where there is one
        print(HELP)
        converse(llm, params, options.system_prompt, input, print)


def converse(
    llm: LLM,
    params: SamplingParams,
    system_prompt: str | None,
    read: Callable[[str], str],
    write: Callable[[str], object],
) -> None:
    """Asks and answers until /exit or the end of input; an answer that fails is not remembered."""
    start: list[dict[str, Any]] = []
    if system_prompt:
        start = [{"role": "system", "content": system_prompt}]
    history = list(start)
    while True:
        try:
            question = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if question == "/exit":
            return
        if question == "/clear":
            history = list(start)
        elif question.startswith("/"):
            write(HELP)
        elif question:
            asked = [*history, {"role": "user", "content": question}]
            text = _answer(llm, params, asked, write)
            if text is not None:
                history = [*asked, {"role": "assistant", "content": text}]


def _answer(
    llm: LLM,
    params: SamplingParams,
    messages: list[dict[str, Any]],
    write: Callable[[str], object],
) -> str | None:
    """Writes the answer; None when it was stopped or the conversation cannot be run."""
    try:
        output = llm.chat(messages, params, use_tqdm=False)[0]
    except KeyboardInterrupt:
        write("(stopped)")
        return None
    except ValueError as error:  # a conversation that has become too long, for one
        write(f"{error}\n/clear starts anew")
        return None
    text = output.outputs[0].text.strip()
    write(text)
    if output.outputs[0].finish_reason == "length":
        write("(cut at the most tokens of an answer)")
    return text
