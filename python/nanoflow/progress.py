"""The progress bar of a generate() call, and what is logged beside it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from time import perf_counter
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from nanoflow.request import Request


class _AboveTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def logs_beside_bar(is_shown: bool) -> Iterator[None]:
    """Shows what nanoflow logs at INFO, its status among it, above a bar that is shown meanwhile.

    Does nothing where the program has set up logging, or another bar is shown already.
    """
    logger = logging.getLogger("nanoflow")
    if not is_shown or logger.hasHandlers():
        yield
        return
    handler, level = _AboveTheBar(), logger.level
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", "%m-%d %X"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class Progress:
    """Requests done, and prompt and output tokens of finished requests a second."""

    def __init__(self, total: int, is_shown: bool) -> None:
        self._bar: Any = tqdm(
            total=total,
            desc="Processed prompts",
            dynamic_ncols=True,
            disable=not is_shown,
            postfix="est. speed input: 0.00 toks/s, output: 0.00 toks/s",
        )
        self._logs = logs_beside_bar(is_shown)
        self._begin = perf_counter()
        self._input = self._output = 0

    def update(self, samples: Sequence[Request]) -> None:
        """All samples of a prompt have finished."""
        self._input += len(samples[0].prompt_token_ids)
        self._output += sum(len(sample.output_token_ids) for sample in samples)
        seconds = max(perf_counter() - self._begin, 1e-9)
        self._bar.postfix = (
            f"est. speed input: {self._input / seconds:.2f} toks/s, "
            f"output: {self._output / seconds:.2f} toks/s"
        )
        self._bar.update(1)

    def __enter__(self) -> Progress:
        self._logs.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._logs.__exit__(None, None, None)
        self._bar.close()
