"""What finished requests become: outputs with text, log-probabilities and times."""

from __future__ import annotations

from collections.abc import Sequence

from nanoflow.detokenizer import IncrementalDetokenizer
from nanoflow.errors import TextError
from nanoflow.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanoflow.prompts import Prompt
from nanoflow.request import Request, TokenLogprobs
from nanoflow.sampling_params import SamplingParams
from nanoflow.stop_strings import StopStrings
from nanoflow.tokenizer import Tokenizer

_CONTEXT_TOKENS = 16  # of the prompt, for the detokenizer


class OutputMaker:
    """Makes outputs as users see them. Stateless, safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def wants_text(self, params: SamplingParams) -> bool:
        return self._tokenizer is not None and params.detokenize

    def output(
        self, samples: Sequence[Request], prompt: Prompt, params: SamplingParams
    ) -> RequestOutput:
        """Of all samples of a prompt, which have finished. Raises TextError as completion()."""
        first = samples[0]
        errors = [sample.error for sample in samples if sample.error is not None]
        return RequestOutput(
            request_id=first.id,
            prompt=prompt.text,
            prompt_token_ids=first.prompt_token_ids.tolist(),
            outputs=[self.completion(sample, params) for sample in samples],
            finished=True,
            metrics=RequestMetrics(
                arrival_time=first.arrival_time,
                first_token_time=min(sample.first_token_time for sample in samples),
                finished_time=max(sample.finished_time for sample in samples),
                num_preemptions=sum(sample.num_preemptions for sample in samples),
            ),
            error=str(errors[0]) if errors else None,
            num_cached_tokens=first.num_cached_tokens,
            prompt_logprobs=self.prompt_logprobs(first, params),
        )

    def failed_output(self, request_id: str, prompt: Prompt, error: Exception) -> RequestOutput:
        """Of a prompt that could not become a request, or a request that could not become text."""
        return RequestOutput(
            request_id=request_id,
            prompt=prompt.text,
            prompt_token_ids=list(prompt.token_ids or ()),
            outputs=[CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")],
            finished=True,
            error=str(error),
        )

    def completion(self, sample: Request, params: SamplingParams) -> CompletionOutput:
        """Of a sample that has finished. Raises TextError when its tokens cannot be made text."""
        wants_logprobs = sample.sampling.logprobs >= 0
        ids = sample.output_token_ids
        try:
            text = "" if isinstance(sample.error, TextError) else self._text(sample, params)
            logprobs = self.logprobs(ids, sample.logprobs, params) if wants_logprobs else None
        except Exception as error:
            raise TextError(sample.id, error) from error
        return CompletionOutput(
            index=sample.index,
            text=text,
            token_ids=ids,
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            cumulative_logprob=(
                sum(one.logprob for one in sample.logprobs) if wants_logprobs else None
            ),
            logprobs=logprobs,
        )

    def logprobs(
        self, ids: Sequence[int], found_of_each: Sequence[TokenLogprobs], params: SamplingParams
    ) -> list[dict[int, Logprob]]:
        """Of tokens, as an output shows them."""
        texts: dict[int, str | None] = {}

        def text_of(token: int) -> str | None:
            if self._tokenizer is None or not params.detokenize:
                return None
            if token not in texts:
                texts[token] = self._tokenizer.decode([token], skip_special_tokens=False)
            return texts[token]

        outputs = []
        for token, found in zip(ids, found_of_each, strict=True):
            entries = {token: Logprob(found.logprob, found.rank, text_of(token))}
            top = zip(found.top.tolist(), found.top_logprobs.tolist(), strict=True)
            for rank, (other, logprob) in enumerate(top, start=1):
                if other >= 0:  # there may be fewer tokens than were asked for
                    entries[other] = Logprob(logprob, rank, text_of(other))
            outputs.append(entries)
        return outputs

    def prompt_logprobs(
        self, sample: Request, params: SamplingParams
    ) -> list[dict[int, Logprob] | None] | None:
        """None for the first token; those of an aborted request may end early."""
        if sample.sampling.prompt_logprobs < 0:
            return None
        found = sample.prompt_logprobs
        ids = sample.prompt_token_ids[1 : 1 + len(found)].tolist()
        return [None, *self.logprobs(ids, found, params)]

    def _text(self, sample: Request, params: SamplingParams) -> str:
        if self._tokenizer is None or not params.detokenize:
            return ""
        ids, watcher = sample.output_token_ids, sample.stop_watcher
        is_stop = sample.finish_reason == "stop"
        is_stop_string = is_stop and isinstance(sample.stop_reason, str)
        is_stop_token = is_stop and not is_stop_string
        if isinstance(watcher, StopStrings):  # which has seen all tokens but one that ended it
            if is_stop_string:
                return watcher.text
            keeps_last = is_stop_token and params.include_stop_str_in_output
            return watcher.finish(ids[-1:] if keeps_last else ())
        if is_stop_token and not params.include_stop_str_in_output:
            ids = ids[:-1]
        detokenizer = self.detokenizer(sample.prompt_token_ids[-_CONTEXT_TOKENS:].tolist(), params)
        return detokenizer.push(ids) + detokenizer.flush()

    def detokenizer(self, prompt: Sequence[int], params: SamplingParams) -> IncrementalDetokenizer:
        """Of what follows a prompt. There must be a tokenizer."""
        assert self._tokenizer is not None
        context = prompt[-_CONTEXT_TOKENS:]
        return IncrementalDetokenizer(self._tokenizer, context, params.skip_special_tokens)
