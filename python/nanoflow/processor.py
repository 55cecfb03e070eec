"""From prompts to requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanoflow.completions import OutputMaker
from nanoflow.prompts import Prompt, check_token_ids
from nanoflow.request import Request
from nanoflow.runtime import Runtime
from nanoflow.sampling_params import SamplingParams
from nanoflow.stop_strings import StopStrings
from nanoflow.token_masks import MaskMaker
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


class Processor:
    """Knows a model's vocabulary, limits and defaults. Safe to use from several threads."""

    def __init__(self, runtime: Runtime, seed: int) -> None:
        self._tokenizer = runtime.tokenizer
        self.outputs = OutputMaker(runtime.tokenizer)
        self._vocab_size = runtime.vocab_size
        self._max_model_len = runtime.limits.max_model_len
        self._seed = seed
        self._eos_token_ids = _eos_token_ids(runtime)
        self._masks = MaskMaker(runtime.tokenizer, self._eos_token_ids, runtime.vocab_size)
        self._defaults = _default_params(runtime.generation_config)

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
        except Exception:  # one text's fault, as surrogates, which have no UTF-8
            return [_encode_or_error(tokenizer, text, add_special_tokens) for text in texts]

    def make_requests(
        self,
        number: int,
        ids: Sequence[int],
        params: SamplingParams,
        on_finish: Callable[[Request], None],
    ) -> list[Request]:
        """One for each of the `params.n` samples of a prompt; the first has the number as its id.

        Raises ValueError on a prompt or parameters that this model cannot run.
        """
        params.check()
        ids = self._truncated(ids, params)
        check_token_ids(ids, self._vocab_size, self._max_model_len)
        output_len = self._max_model_len if params.max_tokens is None else params.max_tokens
        prompt_token_ids = np.asarray(ids, np.int32)
        seed = _mix(self._seed, number)
        samplings = [
            params.resolve(
                self._eos_token_ids, self._vocab_size, _mix(seed, index) if index else seed, index
            )
            for index in range(params.n)
        ]
        masks = self._masks.make(params)
        return [
            Request(
                id=str(number) if index == 0 else f"{number}_{index}",
                index=index,
                prompt_token_ids=prompt_token_ids,
                sampling=sampling,
                max_len=min(len(ids) + output_len, self._max_model_len),
                on_finish=on_finish,
                stop_watcher=self._stop_watcher(ids, params),
                token_mask=masks(),
            )
            for index, sampling in enumerate(samplings)
        ]

    def _truncated(self, ids: Sequence[int], params: SamplingParams) -> Sequence[int]:
        """The last tokens, as many as truncate_prompt_tokens says."""
        most = params.truncate_prompt_tokens
        if most is None:
            return ids
        if most > self._max_model_len:
            raise ValueError(
                f"truncate_prompt_tokens={most} is above max_model_len={self._max_model_len}"
            )
        return ids[-(self._max_model_len - 1 if most == -1 else most) :]

    def _stop_watcher(self, ids: Sequence[int], params: SamplingParams) -> StopStrings | None:
        if not params.stop_strings:
            return None
        self.get_tokenizer()
        return StopStrings(
            self.outputs.detokenizer(ids, params),
            params.stop_strings,
            min_tokens=params.min_tokens,
            keep_stop=params.include_stop_str_in_output,
        )


def _encode_or_error(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool
) -> Sequence[int] | ValueError:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ValueError(f"the prompt is no valid Unicode text: {error}")
    try:
        return tokenizer.encode(text, add_special_tokens)
    except Exception as error:
        return ValueError(f"the tokenizer fails on the prompt: {type(error).__name__}: {error}")


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
