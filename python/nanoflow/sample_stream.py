"""One sample of a request as it is streamed: what has arrived, and what has been told of it."""

from __future__ import annotations

from dataclasses import replace

from nanoflow.completions import OutputMaker
from nanoflow.detokenizer import IncrementalDetokenizer
from nanoflow.errors import TextError
from nanoflow.outputs import CompletionOutput, Logprob
from nanoflow.request import Request
from nanoflow.sampling_params import RequestOutputKind, SamplingParams


class SampleStream:
    """Belongs to the event loop of its reader, from its first token on."""

    def __init__(self, request: Request, params: SamplingParams, maker: OutputMaker) -> None:
        self.tokens: list[int] = []  # that have arrived
        self.is_finished = False  # the sample has ended, and its reader may know
        self._request = request
        self._params = params
        self._maker = maker
        self._is_delta = params.output_kind is RequestOutputKind.DELTA
        # Characters that may turn out to be the beginning of a stop string.
        stops = () if params.include_stop_str_in_output else params.stop_strings
        self._held_back = max(map(len, stops), default=1) - 1
        self._detokenizer: IncrementalDetokenizer | None = None  # where there is to be text
        if maker.wants_text(params):
            self._detokenizer = maker.detokenizer(request.prompt_token_ids.tolist(), params)
        self._is_told = False  # that it has ended
        self._read = 0  # tokens that have been in an output
        self._text = ""  # of the tokens read
        self._shown = 0  # characters that have been in an output
        self._logprobs: list[dict[int, Logprob]] = []  # of the tokens read
        self._cumulative_logprob = 0.0

    @property
    def has_news(self) -> bool:
        """Cumulative outputs always hold all samples."""
        if not self._is_delta:
            return True
        return self._read < len(self.tokens) or (self.is_finished and not self._is_told)

    def output(self) -> CompletionOutput:
        """What has been generated, or what is new of it. Raises TextError where that is no text."""
        if not self.is_finished:
            try:
                return self._partial()
            except Exception as error:
                raise TextError(self._request.id, error) from error
        self._is_told = True
        whole = self._maker.completion(self._request, self._params)
        return self._rest(whole) if self._is_delta else whole

    def _partial(self) -> CompletionOutput:
        begin, end = self._read, len(self.tokens)
        ids = self.tokens[begin:end]
        self._read = end
        if self._detokenizer is not None:
            self._text += self._detokenizer.push(ids)
        wants_logprobs = self._request.sampling.logprobs >= 0
        if wants_logprobs:
            found = self._request.logprobs[begin:end]
            self._logprobs += self._maker.logprobs(ids, found, self._params)
            self._cumulative_logprob += sum(one.logprob for one in found)
        shown = self._shown
        self._shown = max(shown, len(self._text) - self._held_back)
        if not self._is_delta:
            begin = shown = 0
        return CompletionOutput(
            index=self._request.index,
            text=self._text[shown : self._shown],
            token_ids=self.tokens[begin:end],
            finish_reason=None,
            cumulative_logprob=self._cumulative_logprob if wants_logprobs else None,
            logprobs=self._logprobs[begin:] if wants_logprobs else None,
        )

    def _rest(self, whole: CompletionOutput) -> CompletionOutput:
        """What the outputs so far have not told of a finished sample."""
        logprobs = whole.logprobs
        shown, read = self._shown, self._read
        self._read = len(whole.token_ids)
        return replace(
            whole,
            text=whole.text[shown:],
            token_ids=whole.token_ids[read:],
            logprobs=None if logprobs is None else logprobs[read:],
        )
