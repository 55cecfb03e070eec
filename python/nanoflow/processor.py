"""From prompts to requests, and from finished requests to outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanoflow.detokenizer import IncrementalDetokenizer
from nanoflow.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanoflow.prompts import Prompt, check_token_ids
from nanoflow.request import Request, TokenLogprobs
from nanoflow.runtime import Runtime
from nanoflow.sampling_params import SamplingParams
from nanoflow.stop_strings import StopStrings
from nanoflow.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Of generation_config.json, and what they are called here.
_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_CONTEXT_TOKENS = 16  # of the prompt, for the detokenizer


class Processor:
    """Knows a model's vocabulary, limits and defaults. Safe to use from several threads."""

    def __init__(self, runtime: Runtime, seed: int) -> None:
        self._tokenizer = runtime.tokenizer
        self._vocab_size = runtime.vocab_size
        self._max_model_len = runtime.limits.max_model_len
        self._seed = seed
        self._eos_token_ids = _eos_token_ids(runtime)
        self._defaults = _default_params(runtime.generation_config)

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def get_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError("there is no tokenizer, as skip_tokenizer_init=True left it out")
        return self._tokenizer

    def default_params(self) -> SamplingParams:
        return SamplingParams(**self._defaults)

    def encode(self, prompts: Sequence[Prompt]) -> list[Sequence[int] | ValueError]:
        """Token ids of each prompt, or why it has none."""
        encoded: list[Sequence[int] | ValueError] = [prompt.token_ids or () for prompt in prompts]
        for add_special_tokens in (True, False):
            indices = [
                index
                for index, prompt in enumerate(prompts)
                if prompt.token_ids is None and prompt.add_special_tokens is add_special_tokens
            ]
            if not indices:
                continue
            texts = [prompts[index].text or "" for index in indices]
            found = self._encode_texts(texts, add_special_tokens)
            for index, ids in zip(indices, found, strict=True):
                encoded[index] = ids
        return encoded

    def _encode_texts(
        self, texts: Sequence[str], add_special_tokens: bool
    ) -> Sequence[Sequence[int] | ValueError]:
        tokenizer = self.get_tokenizer()
        try:
            return tokenizer.encode_batch(texts, add_special_tokens)
        except TypeError:  # a text of surrogates, which has no UTF-8
            return [_encode_or_error(tokenizer, text, add_special_tokens) for text in texts]

    def make_request(
        self,
        number: int,
        ids: Sequence[int],
        params: SamplingParams,
        on_finish: Callable[[Request], None],
    ) -> Request:
        """Raises ValueError on a prompt or parameters that this model cannot run."""
        check_token_ids(ids, self._vocab_size, self._max_model_len)
        sampling = params.resolve(self._eos_token_ids, self._vocab_size, _mix(self._seed, number))
        output_len = self._max_model_len if params.max_tokens is None else params.max_tokens
        watcher = None
        if params.stop_strings:
            watcher = StopStrings(
                self.detokenizer(ids, params),
                params.stop_strings,
                min_tokens=params.min_tokens,
                keep_stop=params.include_stop_str_in_output,
            )
        return Request(
            id=str(number),
            prompt_token_ids=np.asarray(ids, np.int32),
            sampling=sampling,
            max_len=min(len(ids) + output_len, self._max_model_len),
            on_finish=on_finish,
            stop_watcher=watcher,
        )

    def output(self, request: Request, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        """Of a finished request."""
        wants_logprobs = request.sampling.logprobs >= 0
        ids = request.output_token_ids
        logprobs = self.logprobs(ids, request.logprobs, params) if wants_logprobs else None
        cumulative = sum(one.logprob for one in request.logprobs) if wants_logprobs else None
        completion = CompletionOutput(
            index=0,
            text=self._text(request, params),
            token_ids=ids,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            cumulative_logprob=cumulative,
            logprobs=logprobs,
        )
        return RequestOutput(
            request_id=request.id,
            prompt=prompt.text,
            prompt_token_ids=request.prompt_token_ids.tolist(),
            outputs=[completion],
            finished=True,
            metrics=RequestMetrics(
                arrival_time=request.arrival_time,
                first_token_time=request.first_token_time,
                finished_time=request.finished_time,
                num_preemptions=request.num_preemptions,
            ),
            error=None if request.error is None else str(request.error),
            num_cached_tokens=request.num_cached_tokens,
        )

    def failed_output(self, number: int, prompt: Prompt, error: ValueError) -> RequestOutput:
        """Of a prompt that could not become a request."""
        return RequestOutput(
            request_id=str(number),
            prompt=prompt.text,
            prompt_token_ids=list(prompt.token_ids or ()),
            outputs=[CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")],
            finished=True,
            error=str(error),
        )

    def logprobs(
        self, ids: Sequence[int], found_of_each: Sequence[TokenLogprobs], params: SamplingParams
    ) -> list[dict[int, Logprob]]:
        """Of generated tokens, as an output shows them."""
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

    def _text(self, request: Request, params: SamplingParams) -> str:
        if self._tokenizer is None or not params.detokenize:
            return ""
        ids, watcher = request.output_token_ids, request.stop_watcher
        is_stop_string = isinstance(request.stop_reason, str)
        is_stop_token = request.finish_reason == "stop" and not is_stop_string
        if isinstance(watcher, StopStrings):  # which has seen all tokens but one that ended it
            if is_stop_string:
                return watcher.text
            keeps_last = is_stop_token and params.include_stop_str_in_output
            return watcher.finish(ids[-1:] if keeps_last else ())
        if is_stop_token and not params.include_stop_str_in_output:
            ids = ids[:-1]
        detokenizer = self.detokenizer(request.prompt_token_ids[-_CONTEXT_TOKENS:].tolist(), params)
        return detokenizer.push(ids) + detokenizer.flush()

    def detokenizer(self, prompt: Sequence[int], params: SamplingParams) -> IncrementalDetokenizer:
        """Of what follows a prompt. Raises ValueError as get_tokenizer()."""
        context = prompt[-_CONTEXT_TOKENS:]
        return IncrementalDetokenizer(self.get_tokenizer(), context, params.skip_special_tokens)


def _encode_or_error(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool
) -> Sequence[int] | ValueError:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ValueError(f"the prompt is no valid Unicode text: {error}")
    return tokenizer.encode(text, add_special_tokens)


def _eos_token_ids(runtime: Runtime) -> tuple[int, ...]:
    """Tokens that end a generation: those of the generation config and of the tokenizer."""
    stated = runtime.generation_config.get("eos_token_id", runtime.config.get("eos_token_id"))
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if runtime.tokenizer is not None:
        ids = [*ids, *runtime.tokenizer.eos_token_ids]
    return tuple(dict.fromkeys(token for token in ids if 0 <= token < runtime.vocab_size))


def _default_params(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults of a model, told once."""
    defaults = {
        ours: generation_config[theirs]
        for theirs, ours in _DEFAULTS.items()
        if generation_config.get(theirs) is not None
    }
    if defaults:
        logger.info("sampling defaults from the model's generation config: %s", defaults)
    return defaults


def _mix(seed: int, number: int) -> int:
    """A seed for a request, unlike those of its neighbours.

    The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators).
    """
    z = (seed * 0x9E3779B97F4A7C15 + number + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31
