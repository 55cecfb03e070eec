"""Outputs that arrive while a request runs: from the scheduler's thread to the tasks that wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

from nanoflow.detokenizer import IncrementalDetokenizer
from nanoflow.outputs import CompletionOutput, Logprob, RequestOutput
from nanoflow.processor import Processor
from nanoflow.prompts import Prompt
from nanoflow.request import Request
from nanoflow.sampling_params import RequestOutputKind, SamplingParams

_END = -1  # among tokens: the request has finished


class Outbox:
    """News of a turn of the scheduler, one bundle for each event loop.

    An event loop that is busy finds one bundle when it gets round to it, of as many turns as it
    missed: at most the tokens of its open requests wait for it.
    """

    def __init__(self, abort: Callable[[Iterable[str]], None]) -> None:
        """`abort` ends requests by their ids: those whose event loop has been closed."""
        self._abort = abort
        self._mailboxes: dict[asyncio.AbstractEventLoop, _Mailbox] = {}  # guarded by _changed
        self._changed = threading.Lock()
        self._turn: dict[_Mailbox, list[tuple[OutputStream, int]]] = {}  # the scheduler's

    def mailbox(self, loop: asyncio.AbstractEventLoop) -> _Mailbox:
        """For the streams of an event loop."""
        with self._changed:
            for other in [other for other in self._mailboxes if other.is_closed()]:
                del self._mailboxes[other]
            return self._mailboxes.setdefault(loop, _Mailbox(loop))

    def put(self, stream: OutputStream, token: int) -> None:
        """Called in the scheduler's thread, as flush()."""
        self._turn.setdefault(stream.mailbox, []).append((stream, token))

    def flush(self) -> None:
        """Sends what was put since the last time."""
        if not self._turn:
            return
        turn, self._turn = self._turn, {}
        for mailbox, news in turn.items():
            if not mailbox.send(news):
                self._abort({stream.request.id for stream, _ in news if stream.request})


class _Mailbox:
    """What waits for one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._news: list[tuple[OutputStream, int]] = []

    def send(self, news: list[tuple[OutputStream, int]]) -> bool:
        """From any thread; False when the event loop has been closed."""
        with self._lock:
            is_called = bool(self._news)
            self._news += news
        if not is_called:
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                return False
        return not self._loop.is_closed()

    def _deliver(self) -> None:
        with self._lock:
            news, self._news = self._news, []
        for stream, token in news:
            stream.take(token)


class OutputStream:
    """The outputs of one request, for the task that reads them. Belongs to one event loop.

    Tokens become text when they are read: a slow reader gets fewer outputs, of more tokens each.
    """

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        processor: Processor,
        outbox: Outbox,
    ) -> None:
        """To be called in the event loop of the reader."""
        self.mailbox = outbox.mailbox(asyncio.get_running_loop())
        self.request: Request | None = None  # once it has been submitted
        self.is_aborted = False  # perhaps before that
        self.is_finished = False  # the request has ended, and the stream knows
        self._request_id = request_id
        self._prompt = prompt
        self._params = params
        self._processor = processor
        self._outbox = outbox
        self._changed = asyncio.Event()
        self._is_delta = params.output_kind is RequestOutputKind.DELTA
        # Characters that may turn out to be the beginning of a stop string.
        stops = () if params.include_stop_str_in_output else params.stop_strings
        self._held_back = max(map(len, stops), default=1) - 1
        self._prompt_ids: list[int] = []
        self._detokenizer: IncrementalDetokenizer | None = None  # where there is to be text
        self._tokens: list[int] = []  # that have arrived
        self._read = 0  # of them, have been in an output
        self._text = ""  # of the tokens read
        self._shown = 0  # characters that have been in an output
        self._logprobs: list[dict[int, Logprob]] = []  # of the tokens read
        self._cumulative_logprob = 0.0

    def attach(self, request: Request) -> None:
        """Prepares for the news of a request that is yet to be submitted, from any thread."""
        params = self._params
        self._prompt_ids = request.prompt_token_ids.tolist()
        if params.detokenize and self._processor.has_tokenizer:
            self._detokenizer = self._processor.detokenizer(self._prompt_ids, params)
        if params.output_kind is not RequestOutputKind.FINAL_ONLY:
            request.on_token = self.put_token

    def take(self, token: int) -> None:
        """Hears of a token, or of the end."""
        if token == _END:
            self.is_finished = True
        else:
            self._tokens.append(token)
        self._changed.set()

    async def next(self) -> RequestOutput:
        """Waits for news and returns all there are. Raises what made the request fail."""
        await self._changed.wait()
        self._changed.clear()
        assert self.request is not None
        if self.is_finished:
            return self._last(self.request)
        return self._partial(self.request)

    def put_token(self, token: int) -> None:
        self._outbox.put(self, token)

    def put_end(self, request: Request) -> None:
        self._outbox.put(self, _END)

    def _partial(self, request: Request) -> RequestOutput:
        begin, end = self._read, len(self._tokens)
        ids = self._tokens[begin:end]
        self._read = end
        if self._detokenizer is not None:
            self._text += self._detokenizer.push(ids)
        wants_logprobs = request.sampling.logprobs >= 0
        if wants_logprobs:
            found = request.logprobs[begin:end]
            self._logprobs += self._processor.logprobs(ids, found, self._params)
            self._cumulative_logprob += sum(one.logprob for one in found)
        shown = self._shown
        self._shown = max(shown, len(self._text) - self._held_back)
        if not self._is_delta:
            begin = shown = 0
        completion = CompletionOutput(
            index=0,
            text=self._text[shown : self._shown],
            token_ids=self._tokens[begin:end],
            finish_reason=None,
            cumulative_logprob=self._cumulative_logprob if wants_logprobs else None,
            logprobs=self._logprobs[begin:] if wants_logprobs else None,
        )
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt.text,
            prompt_token_ids=self._prompt_ids,
            outputs=[completion],
            finished=False,
            num_cached_tokens=request.num_cached_tokens,
        )

    def _last(self, request: Request) -> RequestOutput:
        if request.error is not None:
            raise request.error
        output = self._processor.output(request, self._prompt, self._params)
        [completion] = output.outputs
        if self._is_delta:
            logprobs = completion.logprobs
            completion = replace(
                completion,
                text=completion.text[self._shown :],
                token_ids=completion.token_ids[self._read :],
                logprobs=None if logprobs is None else logprobs[self._read :],
            )
        return replace(output, request_id=self._request_id, outputs=[completion])
