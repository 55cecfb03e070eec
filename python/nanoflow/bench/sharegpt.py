"""Conversations in ShareGPT's JSON: the first question is a prompt, its answer gives the length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nanoflow.bench.datasets import Request
from nanoflow.tokenizer import Tokenizer

MIN_LEN = 4  # tokens of prompt and of output, as in vLLM
MAX_INPUT, MAX_TOTAL = 1024, 2048


def read_conversations(path: Path) -> list[tuple[str, str]]:
    """The first two turns of every conversation that has them.

    Raises ValueError naming what the file lacks.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{path} is no JSON list of conversations")
    pairs = [_first_turns(path, number, one) for number, one in enumerate(content)]
    found = [pair for pair in pairs if pair is not None]
    if not found:
        raise ValueError(f"none of {len(content)} conversations of {path} has two turns")
    return found


def _first_turns(path: Path, number: int, conversation: Any) -> tuple[str, str] | None:
    try:
        turns = conversation["conversations"]
        if len(turns) < 2:
            return None
        question, answer = (turn["value"] for turn in turns[:2])
    except (TypeError, KeyError):
        question = answer = None
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError(
            f'{path}, item {number} is no {{"conversations": [{{"value": text}}, ...]}}'
        )
    return question, answer


def sample_conversations(
    conversations: list[tuple[str, str]],
    count: int,
    max_total: int,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    *,
    output_len: int | None,
    oversample: bool,
) -> list[Request]:
    """`count` requests in random order, without those that are too short or too long.

    The output is as long as the answer, or `output_len`. Where there are too few, they are repeated
    in random order, or with `oversample` off fewer are returned.
    Raises ValueError when there are none.
    """
    limit = min(MAX_TOTAL, max_total)
    found: list[Request] = []
    for index in rng.permutation(len(conversations)):
        if len(found) == count:
            break
        question, answer = conversations[index]
        ids = tokenizer.encode(question)
        length = len(tokenizer.encode(answer)) if output_len is None else output_len
        is_short = len(ids) < MIN_LEN or (output_len is None and length < MIN_LEN)
        if not is_short and len(ids) <= MAX_INPUT and len(ids) + length <= limit:
            found.append(Request(ids, length))
    if not found:
        raise ValueError(
            f"none of {len(conversations)} conversations has a prompt of {MIN_LEN} to {MAX_INPUT} "
            f"tokens that fits with its output into {limit}"
        )
    if oversample:
        found += [found[index] for index in rng.integers(len(found), size=count - len(found))]
    return found
