"""Log-probabilities of prompts: which rows of a step tell of them, and whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow.scheduler.engine import StepLogprobs
from nanoflow.scheduler.policy import StepPlan
from nanoflow.scheduler.slots import Ints, Slots, rows_of

# What the arrays of a batch hold for a row that is not sampled.
_NEUTRAL: Mapping[str, float] = MappingProxyType(
    {
        "slots": -1,
        "temperature": 0,
        "top_p": 1,
        "min_p": 0,
        "top_k": 0,
        "seed": 0,
        "counter": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "repetition_penalty": 1,
        "mask_rows": -1,
    }
)
_INDPTRS = ("banned_indptr", "history_indptr", "bias_indptr")


@dataclass(frozen=True, slots=True)
class Scoring:
    """Rows of a step that are followed by a token of the prompt, by request and position."""

    rows: Ints
    slots: Ints
    targets: NDArray[np.int32]  # those tokens

    def __len__(self) -> int:
        return len(self.rows)


def find_scored(slots: Slots, plan: StepPlan) -> Scoring:
    """Of a step whose rows have been booked."""
    takers, begin = plan.slots, np.cumsum(plan.rows) - plan.rows
    rows, owners, targets = [np.empty(0, np.int64)], [np.empty(0, np.int64)], []
    for i in np.flatnonzero(slots.prompt_logprobs[takers] >= 0).tolist():
        slot, end = int(takers[i]), int(slots.computed[takers[i]])
        first = end - int(plan.rows[i])  # position of the first row
        low = max(first + 1, int(slots.first_unscored[slot]))
        high = max(low, min(end + 1, int(slots.prompt_len[slot])))
        rows.append(np.arange(low, high) - 1 - first + begin[i])
        owners.append(np.full(high - low, slot))
        targets.append(slots.tokens[slot, low:high])
    return Scoring(
        np.concatenate(rows),
        np.concatenate(owners),
        np.concatenate([np.empty(0, np.int32), *targets]),
    )


def add_scored(batch: dict[str, NDArray[Any]], slots: Slots, scoring: Scoring) -> None:
    """Puts the rows behind those that are sampled, in all arrays of a batch that have an entry for
    each."""
    count, sampled = len(scoring), len(batch["slots"])
    if "logprobs" not in batch:
        batch["logprobs"] = np.full(sampled, -1, np.int32)
    batch["targets"] = np.concatenate([np.full(sampled, -1, np.int32), scoring.targets])
    batch["logprobs"] = np.concatenate([batch["logprobs"], slots.prompt_logprobs[scoring.slots]])
    batch["sample_rows"] = np.append(batch["sample_rows"], scoring.rows.astype(np.int32))
    for name, value in _NEUTRAL.items():
        if name in batch:
            array = batch[name]
            batch[name] = np.append(array, np.full(count, value, array.dtype))
    for name in _INDPTRS:
        if name in batch:
            batch[name] = np.append(batch[name], np.repeat(batch[name][-1:], count))


def take_scores(slots: Slots, scoring: Scoring, first: int, logprobs: StepLogprobs) -> None:
    """Gives requests the log-probabilities of their prompts, from row `first` of a step's on."""
    running = slots.takes_tokens(scoring.slots)
    owners = scoring.slots[running]
    found = rows_of(logprobs, first + np.flatnonzero(running), slots.prompt_logprobs[owners])
    for slot, one in zip(owners.tolist(), found, strict=True):
        slots.request(slot).prompt_logprobs.append(one)
