"""Requests that bring a batch into its steady state at once.

A run that starts empty takes a request's lifetime or more to get there: first all requests prefill,
then all decode. Here the first requests stand for ones that began earlier: of the tokens they have
generated already the prompt is lengthened, the output shortened. They are as many as run at once
in the long run, their lengths are drawn in proportion to how long a request of such lengths runs,
and their progress is spread evenly over their lives.

That is the state that requests bring about which arrive independently of each other. A run that is
given many requests of equal lengths at once may never come to it: they stay in phase, prefill
together, and together need most of the KV cache. Its rate as a whole is another figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nanoflow.bench.datasets import Lengths
from nanoflow.config import EngineLimits
from nanoflow.scheduler.admission import at_their_ends, steps_of_the_cache


def running_requests(lengths: Sequence[Lengths], limits: EngineLimits) -> int:
    """How many requests run at once in the steady state: as many as have a slot and pages.

    A request that runs holds, averaged over its life, its prompt and half of its output, and half a
    page that is not full.
    """
    inputs, outputs = _columns(lengths)
    held = np.average(inputs + outputs / 2, weights=outputs) + limits.page_size / 2
    fitting = int(limits.num_pages * limits.page_size / held)
    return max(1, min(limits.max_num_seqs, fitting))


def fill_lengths(
    lengths: Sequence[Lengths], count: int, limits: EngineLimits, rng: np.random.Generator
) -> list[Lengths]:
    """`count` requests in the state of running ones, those with most tokens generated first.

    They are prefilled in this order, with what those before them leave of a step's rows by
    decoding, and where pages are short no faster than a long queue is let in (scheduler.admission).
    A request generates from its own prefill until the last one's, so it begins with so many tokens
    less than it is to have then, or with none.
    """
    inputs, outputs = _columns(lengths)
    num_tokens = limits.num_pages * limits.page_size
    chosen = rng.choice(len(lengths), size=count, p=outputs / outputs.sum())
    inputs, outputs = inputs[chosen], outputs[chosen]
    progress = (rng.permutation(count) + 0.5) / count
    target = np.minimum((progress * outputs).astype(np.int64), outputs - 1)
    order = np.argsort(-target, kind="stable")
    fill: list[Lengths] = []
    steps_to_go = 0.0
    for decoding, index in reversed(list(enumerate(order))):
        generated = max(int(target[index] - steps_to_go), 0)
        request = Lengths(int(inputs[index]) + generated, int(outputs[index]) - generated)
        rows = max(limits.max_num_batched_tokens - decoding, 1)
        steps = request.input / rows
        if at_their_ends(request.input, request.output, num_tokens) < limits.max_num_seqs:
            pace = steps_of_the_cache(
                request.input, request.output, num_tokens, limits.max_num_seqs, limits.page_size
            )
            steps = max(steps, pace)
        steps_to_go += steps
        fill.append(request)
    return fill[::-1]


def _columns(lengths: Sequence[Lengths]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    inputs = np.array([one.input for one in lengths], np.int64)
    outputs = np.array([one.output for one in lengths], np.int64)
    return inputs, outputs
