"""The ops that change logits before they are sampled: biases, and masks of what is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import run_beside_cpu
from nanoflow import _core

Rng = np.random.Generator


def random_logits(rng: Rng, rows: int, vocabulary: int) -> NDArray[np.float32]:
    return (3 * rng.standard_normal((rows, vocabulary))).astype(np.float32)


def pack(allowed: NDArray[np.bool_]) -> NDArray[np.int32]:
    """[M, ceil(V / 32)] bit masks of [M, V]."""
    bits = np.zeros((len(allowed), -(-allowed.shape[1] // 32) * 32), np.bool_)
    bits[:, : allowed.shape[1]] = allowed
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


@pytest.mark.parametrize(
    "vocabulary", [1, 33, pytest.param(700, marks=pytest.mark.sanitizer), 151_937]
)
def test_biases_are_added_to_the_tokens_of_their_rows(
    backend: _core.Backend, rng: Rng, vocabulary: int
) -> None:
    counts = np.minimum([0, 1, 700, 0, 5], vocabulary)
    tokens = [rng.permutation(vocabulary)[:count].astype(np.int32) for count in counts]
    values = [rng.uniform(-100, 100, count).astype(np.float32) for count in counts]
    logits = random_logits(rng, len(counts), vocabulary)
    expected = logits.copy()
    for row, (own, added) in enumerate(zip(tokens, values, strict=True)):
        expected[row, own] += added
    run_beside_cpu(
        backend,
        "add_bias",
        0.0,
        logits=logits,
        indptr=np.cumsum([0, *counts]).astype(np.int32),
        tokens=np.concatenate([*tokens, [10**9]]).astype(np.int32),
        values=np.concatenate([*values, [np.nan]]).astype(np.float32),
    )
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize(
    "vocabulary", [1, 31, 32, 33, pytest.param(8193, marks=pytest.mark.sanitizer), 151_937]
)
def test_what_a_mask_leaves_out_cannot_be_sampled(
    backend: _core.Backend, rng: Rng, vocabulary: int
) -> None:
    rows = np.array([2, -1, 0, 1, 2], np.int32)
    allowed = rng.random((3, vocabulary)) < np.array([[0.5], [0.02], [1.0]])
    logits = random_logits(rng, len(rows), vocabulary)
    expected = logits.copy()
    for row, mask in enumerate(rows):
        if mask >= 0:
            expected[row, ~allowed[mask]] = -np.inf
    run_beside_cpu(backend, "mask_logits", 0.0, logits=logits, mask_rows=rows, masks=pack(allowed))
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize(
    ("op", "operands", "message"),
    [
        ("add_bias", {"indptr": [0, 2], "tokens": [5]}, r"row 0 has \[0, 2\) of 1 entries"),
        ("add_bias", {"indptr": [0, 1], "tokens": [70]}, "row 0 has token 70 but the vocabulary"),
        ("add_bias", {"indptr": [0, 1, 1], "tokens": [5]}, "add_bias: indptr is"),
        ("mask_logits", {"mask_rows": [1], "masks": [[1, 1, 1]]}, "row 0 has mask 1, but there is"),
        ("mask_logits", {"mask_rows": [0], "masks": [[1, 1]]}, "a bit for each of 70 tokens"),
    ],
)
def test_what_cannot_be_is_refused(op: str, operands: dict[str, Any], message: str) -> None:
    arrays = {name: np.array(values, np.int32) for name, values in operands.items()}
    if op == "add_bias":
        arrays["values"] = np.ones(len(arrays["tokens"]), np.float32)
    with pytest.raises(_core.EngineError, match=message):
        logits = np.zeros((1, 70), np.float32)
        _core.run_op(op, _core.Backend("cpu", threads=1), logits=logits, **arrays)
