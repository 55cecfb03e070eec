"""From a step to the arrays of the engine's Batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow.scheduler.scoring import add_scored
from nanoflow.scheduler.slots import Ints, Slots
from nanoflow.scheduler.step import Step
from nanoflow.token_bits import leaves_nothing


def build_batch(slots: Slots, step: Step) -> Mapping[str, NDArray[Any]]:
    """The arrays of csrc/pipeline/batch.h for a step that has just been started, by their names."""
    batch = _rows(slots, step) | _pages(slots, step.plan.slots) | _samples(slots, step)
    sampled = step.plan.slots[step.samples]
    if slots.has_penalties[sampled].any():
        batch |= _penalties(slots, sampled)
    if slots.has_bias[sampled].any():
        batch |= _biases(slots, sampled)
    if slots.has_mask[sampled].any():
        batch |= _masks(slots, sampled)
    if (slots.logprobs[sampled] >= 0).any():
        batch["logprobs"] = slots.logprobs[sampled]
    if len(step.scoring) > 0:
        add_scored(batch, slots, step.scoring)
    return batch


def _rows(slots: Slots, step: Step) -> dict[str, NDArray[Any]]:
    takers, rows = step.plan.slots, step.plan.rows
    kv_len = slots.computed[takers]
    indptr = _indptr(rows)
    positions = np.repeat(kv_len - rows - indptr[:-1], rows) + np.arange(indptr[-1])
    slot_of_row = np.repeat(takers, rows)
    tokens = slots.tokens[slot_of_row, positions]
    # The one token of a request that can be missing is its last: it stays in the engine's pool.
    in_flight = positions >= slots.known[slot_of_row]
    return {
        "tokens": np.where(in_flight, -1 - slot_of_row, tokens).astype(np.int32),
        "positions": positions.astype(np.int32),
        "request_indptr": indptr.astype(np.int32),
        "kv_len": kv_len.astype(np.int32),
        "segment_requests": step.plan.segment_requests.astype(np.int32),
        "sample_rows": (indptr[1:][step.samples] - 1).astype(np.int32),
    }


def _pages(slots: Slots, takers: Ints) -> dict[str, NDArray[Any]]:
    indptr, entries = _ragged(slots.pages, takers, slots.num_pages[takers])
    return {"page_indptr": indptr, "page_indices": entries}


def _samples(slots: Slots, step: Step) -> dict[str, NDArray[Any]]:
    takers = step.plan.slots[step.samples]
    counter = slots.computed[takers] - slots.prompt_len[takers]
    num_banned = np.where(counter < slots.min_tokens[takers], slots.num_banned_ids[takers], 0)
    for i in np.flatnonzero(slots.has_mask[takers] & (num_banned > 0)).tolist():
        mask = slots.request(int(takers[i])).token_mask
        assert mask is not None
        if leaves_nothing(mask.bits, slots.end_ids[takers[i], : num_banned[i]]):
            num_banned[i] = 0  # what a grammar completes cannot go on to min_tokens
    banned_indptr, banned = _ragged(slots.end_ids, takers, num_banned)
    return {
        "slots": takers.astype(np.int32),
        "temperature": slots.temperature[takers],
        "top_p": slots.top_p[takers],
        "min_p": slots.min_p[takers],
        "top_k": slots.top_k[takers],
        "seed": slots.seed[takers],
        "counter": counter.astype(np.int32),
        "banned_indptr": banned_indptr,
        "banned": banned,
    }


def _penalties(slots: Slots, takers: Ints) -> dict[str, NDArray[Any]]:
    """A history begins with the first sample since the request was admitted."""
    begins = slots.has_penalties[takers] & (slots.computed[takers] == slots.prefill_len[takers])
    lengths = np.where(begins, slots.prefill_len[takers], 0)
    indptr, tokens = _ragged(slots.tokens, takers, lengths)
    return {
        "presence_penalty": slots.presence_penalty[takers],
        "frequency_penalty": slots.frequency_penalty[takers],
        "repetition_penalty": slots.repetition_penalty[takers],
        "history_indptr": indptr,
        "history_tokens": tokens,
    }


def _biases(slots: Slots, takers: Ints) -> dict[str, NDArray[Any]]:
    biases = [slots.request(slot).sampling.bias for slot in takers.tolist()]
    given = [bias for bias in biases if bias is not None]
    counts = np.array([0 if bias is None else len(bias.tokens) for bias in biases])
    return {
        "bias_indptr": _indptr(counts).astype(np.int32),
        "bias_tokens": np.concatenate([bias.tokens for bias in given]),
        "bias_values": np.concatenate([bias.values for bias in given]),
    }


def _masks(slots: Slots, takers: Ints) -> dict[str, NDArray[Any]]:
    masked = slots.has_mask[takers]
    masks = [slots.request(slot).token_mask for slot in takers[masked].tolist()]
    return {
        "mask_rows": np.where(masked, np.cumsum(masked) - 1, -1).astype(np.int32),
        "masks": np.concatenate([mask.bits for mask in masks if mask is not None]),
    }


def _indptr(counts: Ints) -> Ints:
    indptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return indptr


def _ragged(
    table: NDArray[np.int32], rows: Ints, counts: Ints
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The first counts[i] entries of row rows[i] of a table, for each i: (indptr, entries)."""
    indptr = _indptr(counts)
    begin = rows * table.shape[1] - indptr[:-1]
    entries = table.reshape(-1).take(np.repeat(begin, counts) + np.arange(indptr[-1]))
    return indptr.astype(np.int32), entries
