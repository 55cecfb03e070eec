"""In which order the requests of a batch begin, when that is free to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from nanoflow.request import Request
from nanoflow.scheduler.forecast import PRIOR_TOKENS

ORDERS = ("fcfs", "auto")
PREFIX_TOKENS = 64  # prompts that begin alike this far are kept together


@dataclass(frozen=True, slots=True)
class _Group:
    """Prompts that begin alike, and what they take together."""

    indices: list[int]
    compute: float  # rows of matrix products
    memory: float  # keys read by decode attention, summed over the steps

    @property
    def intensity(self) -> float:
        return self.memory / self.compute


def order_prompts(samples: Sequence[Sequence[Request]]) -> list[int]:
    """Indices of prompts, given the requests that sample each, so that all steps are alike.

    A long prompt with a short answer is work for the matrix units, a short prompt with a long
    answer for the memory, which attention reads in every step. As in BlendServe (ASPLOS'26),
    requests are taken from both ends of their order by intensity, such that what has begun at any
    time has used both in proportion to the whole: so a step finds both kinds running, and overlap
    has something to overlap. Prompts that begin alike stay together, for the prefix cache, in the
    order of their tokens, in which neighbours share the most.
    """
    keyed = [(_tokens(own), index) for index, own in enumerate(samples) if own]
    keyed.sort()
    groups = [
        _make_group([index for _, index in own], samples)
        for _, own in groupby(keyed, key=lambda one: one[0][: PREFIX_TOKENS * 4])
    ]
    groups.sort(key=lambda group: (group.intensity, group.indices[0]))
    mean = sum(group.memory for group in groups) / max(1, sum(group.compute for group in groups))
    order: list[int] = []
    compute = memory = 0.0
    low, high = 0, len(groups)
    while low < high:
        if memory > mean * compute:
            group, low = groups[low], low + 1
        else:
            group, high = groups[high - 1], high - 1
        order += group.indices
        compute += group.compute
        memory += group.memory
    return order


def _tokens(samples: Sequence[Request]) -> bytes:
    """Of the prompt, so that those that begin alike sort side by side."""
    return samples[0].prompt_token_ids.astype(">i4").tobytes()


def _make_group(indices: list[int], samples: Sequence[Sequence[Request]]) -> _Group:
    compute = memory = 0.0
    for index in indices:
        for request in samples[index]:
            prompt = len(request.prompt_token_ids)
            generated = request.max_len - prompt
            if not request.is_length_certain:
                generated = min(generated, PRIOR_TOKENS)
            compute += prompt + generated
            memory += generated * (prompt + generated / 2)
    return _Group(indices, compute, memory)
