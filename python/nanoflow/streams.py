"""Outputs that arrive while a request runs: from the scheduler's thread to the tasks that wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from nanoflow.completions import OutputMaker
from nanoflow.outputs import Logprob, RequestOutput
from nanoflow.prompts import Prompt
from nanoflow.request import Request
from nanoflow.sample_stream import SampleStream
from nanoflow.sampling_params import RequestOutputKind, SamplingParams

_END = -1  # among tokens: the sample has finished

News = tuple["OutputStream", int, int]  # of which sample, and a token or the end


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
        self._turn: dict[_Mailbox, list[News]] = {}  # the scheduler's

    def mailbox(self, loop: asyncio.AbstractEventLoop) -> _Mailbox:
        """For the streams of an event loop."""
        with self._changed:
            for other in [other for other in self._mailboxes if other.is_closed()]:
                del self._mailboxes[other]
            return self._mailboxes.setdefault(loop, _Mailbox(loop))

    def put(self, stream: OutputStream, index: int, token: int) -> None:
        """Called in the scheduler's thread, as flush()."""
        self._turn.setdefault(stream.mailbox, []).append((stream, index, token))

    def flush(self) -> None:
        """Sends what was put since the last time."""
        if not self._turn:
            return
        turn, self._turn = self._turn, {}
        for mailbox, news in turn.items():
            if not mailbox.send(news):
                self._abort({request.id for stream, _, _ in news for request in stream.requests})


class _Mailbox:
    """What waits for one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._news: list[News] = []

    def send(self, news: list[News]) -> bool:
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
        for stream, index, token in news:
            stream.take(index, token)


class OutputStream:
    """The outputs of one request, for the task that reads them. Belongs to one event loop.

    Tokens become text when they are read: a slow reader gets fewer outputs, of more tokens each.
    """

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        maker: OutputMaker,
        outbox: Outbox,
    ) -> None:
        """To be called in the event loop of the reader."""
        self.mailbox = outbox.mailbox(asyncio.get_running_loop())
        self.requests: Sequence[Request] = ()  # one a sample, once they have been submitted
        self.is_aborted = False  # perhaps before that
        self._request_id = request_id
        self._prompt = prompt
        self._params = params
        self._maker = maker
        self._outbox = outbox
        self._changed = asyncio.Event()
        self._prompt_ids: list[int] = []
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._samples: list[SampleStream] = []

    @property
    def is_finished(self) -> bool:
        """Whether all samples have ended, as far as the stream knows."""
        return bool(self._samples) and all(sample.is_finished for sample in self._samples)

    def attach(self, requests: Sequence[Request]) -> None:
        """Prepares for the news of requests that are yet to be submitted, from any thread."""
        self._prompt_ids = requests[0].prompt_token_ids.tolist()
        self._samples = [SampleStream(request, self._params, self._maker) for request in requests]
        if self._params.output_kind is not RequestOutputKind.FINAL_ONLY:
            for request in requests:
                request.on_token = partial(self.put_token, request.index)

    def take(self, index: int, token: int) -> None:
        """Hears of a token of a sample, or of its end."""
        if token != _END:
            self._samples[index].tokens.append(token)
        else:
            self._samples[index].is_finished = True
        if self.is_finished or self._params.output_kind is not RequestOutputKind.FINAL_ONLY:
            self._changed.set()

    async def next(self) -> RequestOutput:
        """Waits for news and returns all there are. Raises what made the request fail."""
        await self._changed.wait()
        self._changed.clear()
        for request in self.requests:
            if request.finish_reason is not None and request.error is not None:
                raise request.error
        completions = [sample.output() for sample in self._samples if sample.has_news]
        if self.is_finished:
            output = self._maker.output(self.requests, self._prompt, self._params)
            return replace(
                output,
                request_id=self._request_id,
                outputs=completions,
                prompt_logprobs=self._news_of_prompt(),
            )
        first = self.requests[0]
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt.text,
            prompt_token_ids=self._prompt_ids,
            outputs=completions,
            finished=False,
            num_cached_tokens=first.num_cached_tokens,
            prompt_logprobs=self._news_of_prompt(),
        )

    def _news_of_prompt(self) -> list[dict[int, Logprob] | None] | None:
        """Log-probabilities of the prompt, once all are there; DELTA outputs tell them once."""
        first = self.requests[0]
        if self._prompt_logprobs is None and (not first.scores_prompt or self.is_finished):
            self._prompt_logprobs = self._maker.prompt_logprobs(first, self._params)
        elif self._params.output_kind is RequestOutputKind.DELTA:
            return None
        return self._prompt_logprobs

    def put_token(self, index: int, token: int) -> None:
        self._outbox.put(self, index, token)

    def put_end(self, request: Request) -> None:
        self._outbox.put(self, request.index, _END)
