"""Which requests the tokens of a step end, and why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoflow.errors import TextError
from nanoflow.request import FinishReason
from nanoflow.scheduler.slots import Ints, Slots


@dataclass(frozen=True, slots=True)
class End:
    slot: int
    reason: FinishReason
    stop_reason: str | int | None = None
    error: Exception | None = None  # of reason "error"


def find_ends(slots: Slots, sampled: Ints, tokens: NDArray[np.int32]) -> list[End]:
    """The requests that end with the tokens they have just taken, which `slots` already holds.

    Tokens come before stop strings, and both before the length. Masks that depend on tokens take
    those that end nothing; one that no token can follow ends its request with an error. min_tokens
    needs no look here: the engine samples no token that ends a request before it.
    """
    column = np.arange(slots.end_ids.shape[1])
    matches = slots.end_ids[sampled] == tokens[:, None]
    matches &= column < slots.num_end_ids[sampled, None]
    by_token = matches.any(axis=1)
    by_length = slots.known[sampled] >= slots.max_len[sampled]
    watched = slots.has_stop_strings[sampled] | slots.binds_late[sampled]
    ends: list[End] = []
    for i in np.flatnonzero(by_token | by_length | watched).tolist():
        slot, token = int(sampled[i]), int(tokens[i])
        if by_token[i]:
            is_stop = np.argmax(matches[i]) < slots.num_stop_ids[slot]
            ends.append(End(slot, "stop", token if is_stop else None))
            continue
        request = slots.request(slot)
        try:
            stop = request.stop_watcher.push(token) if request.stop_watcher is not None else None
        except Exception as error:
            ends.append(End(slot, "error", error=TextError(request.id, error)))
            continue
        if stop is not None:
            ends.append(End(slot, "stop", stop))
        elif by_length[i]:
            ends.append(End(slot, "length"))
        elif slots.binds_late[slot] and request.token_mask is not None:
            try:
                request.token_mask.push(token)
            except Exception as error:
                ends.append(End(slot, "error", error=error))
    return ends
