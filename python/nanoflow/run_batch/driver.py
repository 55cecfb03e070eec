"""Runs the requests of a batch, a bounded number at a time, and writes each answer as it comes."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.async_llm import AsyncLLM
from nanoflow.errors import EngineError, RequestError
from nanoflow.outputs import RequestOutput
from nanoflow.run_batch.files import OutputFile, custom_id_of, line_id, read_lines
from nanoflow.run_batch.openai import CHAT_URL, COMPLETIONS_URL, make_body, parse_body
from nanoflow.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    answered: int = 0
    failed: int = 0  # of them, with an error
    is_stopped: bool = False  # by a signal, with requests left


class BatchRun:
    """One pass over the input. Belongs to an event loop."""

    def __init__(
        self,
        llm: AsyncLLM,
        tokenizer: Tokenizer | None,
        names: Sequence[str],
        output: OutputFile,
        on_answer: Callable[[], object],
    ) -> None:
        """`names`: what requests may call the model; answers give the first."""
        self._llm = llm
        self._tokenizer = tokenizer
        self._names = names
        self._output = output
        self._on_answer = on_answer
        self._tally = Tally()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: EngineError | OSError | None = None

    def stop(self) -> None:
        """Begins no more requests; at the second time gives those up that run."""
        if self._stop.is_set():
            for task in self._tasks:
                task.cancel()
        self._stop.set()

    async def run(self, path: Path, most_open: int, drain_seconds: float) -> Tally:
        """Answers what has no answer yet. `most_open` requests are read ahead at most.

        After stop(), those that run have `drain_seconds` to end; what then has no answer is left to
        the next run. Raises EngineError when the engine fails, OSError when the output does.
        """
        for number, line in read_lines(path):
            if self._output.is_done(number, line):
                continue
            while len(self._tasks) >= most_open and not self._is_over():
                await self._wait_for_one()
            if self._is_over():
                self._tally.is_stopped = True
                break
            task = asyncio.create_task(self._answer(number, line))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await self._drain(drain_seconds)
        if self._failure is not None:
            raise self._failure
        return self._tally

    def _is_over(self) -> bool:
        return self._stop.is_set() or self._failure is not None

    async def _wait_for_one(self) -> None:
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({stop, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()

    async def _drain(self, seconds: float) -> None:
        while self._tasks and not self._is_over():
            await self._wait_for_one()
        if self._tasks and self._failure is None:
            self._tally.is_stopped = True
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer(self, number: int, line: bytes) -> None:
        try:
            answer = {"response": await self._respond(number, line), "error": None}
        except _Refused as refusal:
            answer = self._error(number, refusal.status, str(refusal))
        except (ValueError, TypeError) as error:
            answer = self._error(number, 400, str(error))
        except RequestError as error:
            answer = self._error(number, 500, str(error))
        except EngineError as error:
            self._failure = error
            return
        except Exception as error:  # a mistake of ours: the line is answered all the same
            logger.exception("line %d cannot be answered", number + 1)
            answer = self._error(number, 500, f"{type(error).__name__}: {error}")
        try:
            self._output.append(number, {"custom_id": custom_id_of(line), **answer})
        except OSError as error:
            self._failure = error
            return
        self._tally.answered += 1
        self._tally.failed += answer["error"] is not None
        self._on_answer()

    async def _respond(self, number: int, line: bytes) -> dict[str, Any]:
        url, body = self._parse(line)
        work = parse_body(url, body, self._llm.get_default_sampling_params(), self._tokenizer)
        outputs = await asyncio.gather(
            *(
                self._generate(prompt, work.params, f"{number}.{index}")
                for index, prompt in enumerate(work.prompts)
            )
        )
        return {
            "status_code": 200,
            "request_id": line_id(number),
            "body": make_body(work, outputs, line_id(number), self._names[0]),
        }

    def _parse(self, line: bytes) -> tuple[str, Mapping[str, Any]]:
        try:
            request = json.loads(line)
        except ValueError as error:
            raise ValueError(f"the line is no JSON: {error}") from None
        if custom_id_of(line) is None:
            raise ValueError('a request is {"custom_id": text, "method", "url", "body"}')
        url, body = request.get("url"), request.get("body")
        if request.get("method", "POST") != "POST" or url not in (CHAT_URL, COMPLETIONS_URL):
            raise _Refused(404, f"url {url!r} is not served; POST {CHAT_URL} or {COMPLETIONS_URL}")
        if not isinstance(body, dict):
            raise ValueError("body must be an object")
        if body.get("model") not in (None, *self._names):
            raise _Refused(404, f"the model {body['model']!r} is not {' or '.join(self._names)}")
        return url, body

    async def _generate(self, prompt: Any, params: Any, request_id: str) -> RequestOutput:
        async for output in self._llm.generate(prompt, params, request_id):
            last = output
        return last

    def _error(self, number: int, status: int, message: str) -> dict[str, Any]:
        kind = {400: "BadRequestError", 404: "NotFoundError"}.get(status, "InternalServerError")
        return {
            "response": {"status_code": status, "request_id": line_id(number), "body": None},
            "error": {"message": message, "type": kind, "param": None, "code": status},
        }


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def stop_on_signals(run: BatchRun) -> None:
    """SIGTERM and SIGINT drain, the second of either gives up. For the running event loop."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, run.stop)
