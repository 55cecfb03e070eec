"""The files of a batch: lines in, lines out, and what of it is done already.

The output is the only record of progress. Each of its lines names the line of the input that it
answers, and is appended by one write: whatever kills the process leaves whole lines and at most one
torn one at the end, which the next run cuts off.
"""

from __future__ import annotations

import fcntl
import json
import os
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

_ID_PREFIX = "nanoflow-batch-"


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number, from 0, and content of each line that is not blank; the file is never held whole."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if line.strip():
                yield number, line


def line_id(number: int) -> str:
    """The `id` of the answer to a line."""
    return f"{_ID_PREFIX}{number}"


class OutputFile:
    """The answers so far, open for more. One process may have it. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it cannot be opened, ValueError when another process has it open, or
        when it holds what run-batch did not write."""
        self._path = path
        self._done = _Done()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._resume()
        except BlockingIOError:
            os.close(self._fd)
            raise ValueError(f"another process writes {path}; wait for it, or end it") from None
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def num_done(self) -> int:
        return self._done.count

    def is_done(self, number: int, line: bytes) -> bool:
        """Whether a line of the input has its answer.

        Raises ValueError when the answer is to another line, of another input.
        """
        if not self._done.has(number):
            return False
        if not self._done.agrees(number, custom_id_of(line)):
            raise ValueError(
                f"{self._path} answers other requests: its answer to line {number + 1} has another "
                "custom_id than the input; give another output, or pass --overwrite"
            )
        return True

    def append(self, number: int, answer: Mapping[str, Any]) -> None:
        """Adds the answer to a line of the input."""
        line = (json.dumps({"id": line_id(number), **answer}) + "\n").encode()
        written = os.write(self._fd, line)
        while written < len(line):  # a full disk raises with the next write
            written += os.write(self._fd, line[written:])
        self._done.add(number, answer["custom_id"])

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._fd)
        os.close(self._fd)

    def _resume(self) -> None:
        """Learns what is done, and cuts off a line that was not written to its end."""
        whole = 0
        with open(self._fd, "rb", closefd=False) as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._learn(line)
                whole += len(line)
        os.ftruncate(self._fd, whole)

    def _learn(self, line: bytes) -> None:
        try:
            answer = json.loads(line)
            name, custom_id = answer["id"], answer["custom_id"]
            number = int(name.removeprefix(_ID_PREFIX))
            is_ours = name == line_id(number)
        except (ValueError, TypeError, KeyError, AttributeError):
            is_ours = False
        if not is_ours:
            raise ValueError(
                f"{self._path} holds a line that run-batch did not write: {line[:80]!r}; give "
                "another output, or pass --overwrite"
            )
        self._done.add(number, custom_id)


def custom_id_of(line: bytes) -> str | None:
    """Of a line of the input, None where it has none."""
    try:
        custom_id = json.loads(line)["custom_id"]
    except (ValueError, TypeError, KeyError):
        return None
    return custom_id if isinstance(custom_id, str) else None


class _Done:
    """Lines that are done, in four bytes each: a check sum of the custom_id, never 0."""

    def __init__(self) -> None:
        self.count = 0
        self._sums = array("I")

    def add(self, number: int, custom_id: str | None) -> None:
        if number >= len(self._sums):
            self._sums.extend([0] * (number + 1 - len(self._sums)))
        self.count += self._sums[number] == 0
        self._sums[number] = _check_sum(custom_id)

    def has(self, number: int) -> bool:
        return number < len(self._sums) and self._sums[number] != 0

    def agrees(self, number: int, custom_id: str | None) -> bool:
        return self._sums[number] == _check_sum(custom_id)


def _check_sum(custom_id: str | None) -> int:
    return crc32((custom_id or "").encode("utf-8", "surrogatepass")) | 1
