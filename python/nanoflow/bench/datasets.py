"""Workloads of a throughput run: prompt and output lengths, and random prompts of those lengths.

Everything is a pure function of its arguments; random numbers come from the generator passed in.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Column names of length traces in use, lower case without separators.
INPUT_COLUMNS = frozenset(
    f"{noun}{unit}"
    for noun in ("input", "prompt", "context", "numprefill", "numinput", "numprompt")
    for unit in ("", "len", "length", "lens", "tokens", "tokenlen")
)
OUTPUT_COLUMNS = frozenset(
    f"{noun}{unit}"
    for noun in ("output", "generated", "completion", "response", "numdecode", "numoutput")
    for unit in ("", "len", "length", "lens", "tokens", "tokenlen")
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of one request."""

    input: int
    output: int


@dataclass(frozen=True, slots=True)
class Request:
    prompt_token_ids: list[int]
    output_len: int


def random_lengths(
    input_len: int, output_len: int, range_ratio: float, count: int, rng: np.random.Generator
) -> list[Lengths]:
    """Uniform integers of [L * (1 - r), L * (1 + r)], rounded outwards and at least 1.

    The meaning of the ratio is vLLM's: 0 makes every length L.
    """
    if not 0 <= range_ratio < 1:
        raise ValueError(f"range ratio is {range_ratio}; it must be in [0, 1)")
    if input_len < 1 or output_len < 1:
        raise ValueError(f"lengths are {input_len} in, {output_len} out; both must be at least 1")

    def draw(mean: int) -> NDArray[np.int64]:
        low = max(1, math.floor(mean * (1 - range_ratio)))
        return rng.integers(low, math.ceil(mean * (1 + range_ratio)) + 1, size=count)

    inputs, outputs = draw(input_len), draw(output_len)
    return [Lengths(int(i), int(o)) for i, o in zip(inputs, outputs, strict=True)]


def read_trace(path: Path) -> list[Lengths]:
    """The (input, output) lengths of a CSV file, one request a row.

    With a header, the columns are found by name ("input", "prompt_tokens", "output_len", ...);
    without, they are the first two. Raises ValueError naming what the file lacks.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows:
        raise ValueError(f"{path} is empty")
    columns, first = (0, 1), 0
    if not all(_is_integer(cell) for cell in rows[0]):
        columns, first = _find_columns(path, rows[0]), 1
    return [_lengths(path, number, row, columns) for number, row in enumerate(rows[first:], first)]


def _is_integer(cell: str) -> bool:
    return cell.strip().isdecimal()


def _find_columns(path: Path, header: Sequence[str]) -> tuple[int, int]:
    names = ["".join(filter(str.isalnum, cell.lower())) for cell in header]
    found = []
    for what, known in (("input", INPUT_COLUMNS), ("output", OUTPUT_COLUMNS)):
        matches = [index for index, name in enumerate(names) if name in known]
        if len(matches) != 1:
            raise ValueError(
                f"{path} has {len(matches)} columns of {what} lengths among {', '.join(header)}; "
                f"name one of them {what}_len"
            )
        found.append(matches[0])
    return found[0], found[1]


def _lengths(path: Path, number: int, row: Sequence[str], columns: tuple[int, int]) -> Lengths:
    try:
        cells = [row[column] for column in columns]
    except IndexError:
        raise ValueError(f"{path}, row {number + 1} has {len(row)} columns: {row}") from None
    if not all(_is_integer(cell) for cell in cells):
        raise ValueError(f"{path}, row {number + 1} has lengths {cells}; they must be integers")
    return Lengths(int(cells[0]), int(cells[1]))


def sample_trace(
    trace: Sequence[Lengths],
    count: int,
    max_total: int,
    rng: np.random.Generator,
    *,
    oversample: bool = True,
) -> list[Lengths]:
    """`count` requests of the trace in random order, without those longer than `max_total` tokens
    or with an empty side; a trace with fewer is repeated, or with `oversample` off given once.
    """
    usable = [
        lengths
        for lengths in trace
        if lengths.input > 0 and lengths.output > 0 and lengths.input + lengths.output <= max_total
    ]
    if not usable:
        raise ValueError(f"none of {len(trace)} requests of the trace fits into {max_total} tokens")
    order = rng.permutation(len(usable))
    if not oversample:
        count = min(count, len(usable))
    return [usable[order[index % len(usable)]] for index in range(count)]


def random_requests(
    lengths: Sequence[Lengths],
    vocab_size: int,
    special_ids: Collection[int],
    rng: np.random.Generator,
    *,
    prefix_len: int = 0,
) -> list[Request]:
    """Prompts of uniformly random tokens of the vocabulary, special ones left out.

    All begin with the same `prefix_len` tokens, which the lengths do not count.
    """
    tokens = np.setdiff1d(np.arange(vocab_size), np.fromiter(special_ids, np.int64))
    if tokens.size == 0:
        raise ValueError(f"all {vocab_size} tokens of the vocabulary are special")
    prefix = rng.choice(tokens, size=prefix_len).tolist() if prefix_len else []
    return [
        Request(prefix + rng.choice(tokens, size=request.input).tolist(), request.output)
        for request in lengths
    ]
