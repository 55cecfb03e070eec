"""The user's interface for servers: requests that stream their outputs to asyncio tasks."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, Collection, Iterable
from pathlib import Path
from typing import Any

from nanoflow.config import check_timeout
from nanoflow.front import Front
from nanoflow.outputs import RequestOutput
from nanoflow.prompts import Prompt, PromptLike, parse_prompts
from nanoflow.request import Request
from nanoflow.sampling_params import SamplingParams
from nanoflow.streams import Outbox, OutputStream
from nanoflow.tokenizer import Tokenizer


class AsyncLLM(Front):
    """A model with its tokenizer, KV cache and scheduler, for asyncio: vLLM's AsyncLLM.

    `AsyncLLM(model, **arguments)` takes the arguments of `nanoflow.config.EngineArgs` and raises as
    LLM does. Tasks of several event loops, in several threads, may use it at once.
    """

    def __init__(self, model: str | Path, **arguments: Any) -> None:
        super().__init__(model, arguments)
        self._numbers = itertools.count()
        self._outbox = Outbox(self._runtime.loop.abort)
        self._runtime.loop.call_after_turns(self._outbox.flush)
        self._lock = threading.Lock()
        self._streams: dict[str, OutputStream] = {}  # open ones, by request id; guarded by _lock

    async def generate(
        self,
        prompt: PromptLike,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generates for one prompt, with outputs as `sampling_params.output_kind` says.

        CUMULATIVE outputs hold all that has been generated so far, DELTA outputs what is new, and
        FINAL_ONLY gives one at the end; with n > 1 a DELTA output holds the samples that have news.
        The last output alone is `finished`. A reader that is
        slower than the model gets fewer outputs, of more tokens each. When the task is cancelled,
        or leaves the loop, the request is aborted. With scheduling_policy="priority", requests with
        a lower `priority` go first.
        `timeout`: seconds until the request ends with what there is, waiting included: its last
        output then has finish_reason "abort" and stop_reason "timeout".
        Raises QueueFullError beyond max_num_queued_reqs and max_num_queued_tokens, ValueError on a
        prompt or parameters that cannot be run and on an id in use,
        TypeError on anything of a wrong type, EngineError with its cause when the engine fails.
        """
        prompts = parse_prompts(prompt)
        if len(prompts) != 1:
            raise TypeError(f"generate() takes one prompt, not {len(prompts)}; call it for each")
        params = self._processor.default_params() if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise TypeError("sampling_params must be a SamplingParams, or None")
        self.args.check_priority(priority)
        stream = self._open(request_id, prompts[0], params)
        try:
            requests = await asyncio.to_thread(self._make_requests, prompts[0], params, stream)
            for request in requests:
                request.priority = priority
                request.timeout = check_timeout(timeout)
            self._submit(stream, requests)
            is_last = False
            while not is_last:
                output = await stream.next()
                self._status.tick()
                is_last = output.finished
                yield output
        finally:
            self._close(request_id, stream)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests with what they have generated: their last output has finish_reason "abort".

        Ids that are not open are left alone.
        """
        ids = [request_id] if isinstance(request_id, str) else request_id
        with self._lock:
            streams = [self._streams[one] for one in ids if one in self._streams]
            for stream in streams:
                stream.is_aborted = True
            numbers = [request.id for stream in streams for request in stream.requests]
        self._runtime.loop.abort(numbers)

    async def get_tokenizer(self) -> Tokenizer:
        """Raises ValueError when it was left out by skip_tokenizer_init."""
        return self._processor.get_tokenizer()

    async def reset_prefix_cache(self) -> bool:
        """Lets requests from now on find nothing of earlier ones in the KV cache. Returns True."""
        self._runtime.loop.forget_prefixes()
        return True

    async def sleep(self, level: int = 1) -> None:
        """As LLM.sleep()."""
        await asyncio.to_thread(self._runtime.sleep, level)

    async def wake_up(self, tags: Collection[str] | None = None) -> None:
        """As LLM.wake_up()."""
        await asyncio.to_thread(self._runtime.wake_up, tags)

    async def is_sleeping(self) -> bool:
        """Whether anything sleeps; generate() raises EngineError as long."""
        return bool(self._runtime.loop.asleep)

    @property
    def errored(self) -> bool:
        """Whether the engine has failed; it is closed then."""
        return self._runtime.loop.failure is not None

    async def check_health(self) -> None:
        """Raises EngineError with its cause when the engine has failed."""
        self._runtime.loop.check_health()

    def shutdown(self) -> None:
        """Aborts what is running and stops the engine. May be called more than once.

        Returns when the steps on their way have completed. Open streams get their last output.
        """
        self._finalizer()

    def _open(self, request_id: str, prompt: Prompt, params: SamplingParams) -> OutputStream:
        if not isinstance(request_id, str):
            raise TypeError(f"request_id={request_id!r} must be a text")
        stream = OutputStream(request_id, prompt, params, self._processor.outputs, self._outbox)
        with self._lock:
            if request_id in self._streams:
                raise ValueError(f"request id {request_id!r} is in use")
            self._streams[request_id] = stream
        return stream

    def _make_requests(
        self, prompt: Prompt, params: SamplingParams, stream: OutputStream
    ) -> list[Request]:
        [ids] = self._processor.encode([prompt])
        if isinstance(ids, ValueError):
            raise ids
        number = next(self._numbers)
        requests = self._processor.make_requests(number, ids, params, stream.put_end)
        stream.attach(requests)
        return requests

    def _submit(self, stream: OutputStream, requests: list[Request]) -> None:
        with self._lock:
            stream.requests = requests
            self._runtime.loop.submit(requests)
            is_aborted = stream.is_aborted
        if is_aborted:
            self._abort(stream)

    def _abort(self, stream: OutputStream) -> None:
        self._runtime.loop.abort([request.id for request in stream.requests])

    def _close(self, request_id: str, stream: OutputStream) -> None:
        """Forgets a stream that nobody reads any more."""
        with self._lock:
            del self._streams[request_id]
        if not stream.is_finished:
            self._abort(stream)
