"""What ops refuse, and what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanoflow import _core

F32 = np.float32


def zeros(*shape: int, dtype: Any = F32) -> Any:
    return np.zeros(shape, dtype)


@pytest.fixture(scope="module")
def cpu() -> _core.Backend:
    return _core.Backend("cpu", threads=1)


def embed(**changes: Any) -> dict[str, Any]:
    return {
        "tokens": zeros(3, dtype=np.int32),
        "token_pool": zeros(2, dtype=np.int32),
        "table": zeros(10, 4),
        "out": zeros(3, 4),
    } | changes


def attention(**changes: Any) -> dict[str, Any]:
    return {
        "q": zeros(2, 8),
        "out": zeros(2, 8),
        "k_cache": zeros(3, 1, 4, 8),
        "v_cache": zeros(3, 1, 4, 8),
        "segment_requests": np.array([0, 1], np.int32),
        "row_begin": np.array([0], np.int32),
        "row_count": np.array([2], np.int32),
        "kv_len": np.array([6], np.int32),
        "page_indptr": np.array([0, 2], np.int32),
        "page_indices": np.array([2, 0], np.int32),
        "segment_begin": 0,
        "segment_end": 1,
        "scale": 1.0,
    } | changes


def rope(**changes: Any) -> dict[str, Any]:
    return {
        "qkv": zeros(2, 16),
        "positions": np.array([0, 1], np.int32),
        "kv_slots": np.array([0, 1], np.int32),
        "cos_sin": zeros(5, 4),
        "k_cache": zeros(3, 1, 4, 4),
        "v_cache": zeros(3, 1, 4, 4),
    } | changes


def sampling(**changes: Any) -> dict[str, Any]:
    floats = {name: zeros(2) for name in ("temperature", "top_p", "min_p")}
    ints = {name: zeros(2, dtype=np.int32) for name in ("slots", "top_k", "counter", "sampled")}
    return {
        "logits": zeros(2, 9),
        "seed": zeros(2, dtype=np.uint64),
        "banned_indptr": zeros(3, dtype=np.int32),
        "banned": zeros(0, dtype=np.int32),
        "token_pool": zeros(2, dtype=np.int32),
        **floats,
        **ints,
    } | changes


CASES: list[tuple[str, dict[str, Any], str]] = [
    (
        "embed",
        embed(out=zeros(3, 5)),
        r"embed: out is float32\[3, 5\] but its dimension 1 \(H\) must be 4",
    ),
    ("embed", embed(tokens=zeros(3)), r"embed: tokens is float32\[3\] but must be int32"),
    (
        "embed",
        embed(tokens=np.array([0, 10, 0], np.int32)),
        "embed: row 1 holds token 10 but the vocabulary has 10",
    ),
    (
        "embed",
        embed(tokens=np.array([-3, 0, 0], np.int32)),
        "embed: token -3 of row 0 stands for slot 2 of a pool of 2",
    ),
    (
        "gather_rows",
        {"x": zeros(4, 2), "index": np.array([4], np.int32), "out": zeros(1, 2)},
        r"gather_rows: index 4 of row 0 is outside x, float32\[4, 2\]",
    ),
    (
        "rms_norm",
        {"x": zeros(2, 8)[:, ::2], "out": zeros(2, 4), "weight": zeros(4), "eps": 1e-5},
        "rms_norm: x must have stride 1 in its last dimension",
    ),
    (
        "rms_norm",
        {
            "x": zeros(2, 4, dtype=np.int32),
            "out": zeros(2, 4),
            "weight": zeros(4),
            "eps": 1e-5,
        },
        "rms_norm does not support dtype int32; use float32, bfloat16 or float16",
    ),
    (
        "gemm_silu_mul",
        {"x": zeros(2, 4), "weight": zeros(16, 4), "out": zeros(2, 16)},
        r"gemm_silu_mul: weight is float32\[16, 4\] but needs twice the columns of out, float32",
    ),
    (
        "gemm",
        {"x": zeros(2, 4), "weight": zeros(6, 4), "out": zeros(2, 6), "bias": zeros(5)},
        r"gemm: bias is float32\[5\] but its dimension 0 \(N\) must be 6",
    ),
    ("rope_append", rope(qkv=zeros(2, 8)), "needs q heads, 1 k heads and 1 v heads of 4"),
    (
        "rope_append",
        rope(positions=np.array([0, 5], np.int32)),
        "rope_append: row 1 is at position 5 but the table has 5",
    ),
    (
        "rope_append",
        rope(kv_slots=np.array([0, 12], np.int32)),
        "rope_append: row 1 has KV slot 12 of 12",
    ),
    ("attention", attention(q=zeros(2, 12), out=zeros(2, 12)), "no multiple of 1 KV heads of 8"),
    (
        "attention",
        attention(page_indices=np.array([2, 3], np.int32)),
        "attention: request 0 has page 3 of 3",
    ),
    (
        "attention",
        attention(kv_len=np.array([9], np.int32)),
        "attention: request 0 has 2 rows, 9 keys and 2 pages of 4",
    ),
    (
        "attention",
        attention(row_begin=np.array([1], np.int32)),
        r"attention: request 0 has rows \[1, 3\) of 2",
    ),
    ("attention", attention(scale=0.0), "attention: scale is 0 but must be positive"),
    ("attention", attention(segment_end=2), r"attention: segments \[0, 2\) of 1"),
    ("sample", sampling(seed=zeros(2, dtype=np.int32)), "sample: seed is int32"),
    (
        "sample",
        sampling(slots=np.array([0, 2], np.int32)),
        "sample: row 1 has slot 2 of a pool of 2",
    ),
    (
        "sample",
        sampling(banned_indptr=np.array([0, 0, 1], np.int32), banned=np.array([9], np.int32)),
        "sample: row 1 bans token 9 but the vocabulary has 9",
    ),
]


@pytest.mark.parametrize("op, operands, message", CASES)
def test_ops_refuse_bad_operands(
    cpu: _core.Backend, op: str, operands: dict[str, Any], message: str
) -> None:
    with pytest.raises(_core.EngineError, match=message):
        _core.run_op(op, cpu, **operands)


def test_good_operands_pass(cpu: _core.Backend) -> None:
    """The cases above fail for the one thing that each changes."""
    _core.run_op("embed", cpu, **embed())
    _core.run_op("rope_append", cpu, **rope())
    _core.run_op("attention", cpu, **attention())
    _core.run_op("sample", cpu, **sampling(slots=np.array([0, 1], np.int32)))


INDEX = zeros(1, dtype=np.int32)


def test_operands_are_the_fields_of_the_op(cpu: _core.Backend) -> None:
    with pytest.raises(ValueError, match="there is no op 'softmax'; there are embed, rms_norm"):
        _core.run_op("softmax", cpu)
    with pytest.raises(TypeError, match="gather_rows lacks operand 'out'"):
        _core.run_op("gather_rows", cpu, x=zeros(1, 2), index=INDEX)
    with pytest.raises(TypeError, match="gather_rows has no operand 'bias'"):
        _core.run_op("gather_rows", cpu, x=zeros(1, 2), index=INDEX, out=zeros(1, 2), bias=1)
    with pytest.raises(TypeError, match="gather_rows: out is no NumPy array"):
        _core.run_op("gather_rows", cpu, x=zeros(1, 2), index=INDEX, out=[1.0])


def test_arrays_that_are_no_tensors(cpu: _core.Backend) -> None:
    out = zeros(1, 2)
    with pytest.raises(_core.EngineError, match="arrays of float64 are not supported"):
        _core.run_op("gather_rows", cpu, x=zeros(1, 2, dtype=np.float64), index=INDEX, out=out)
    with pytest.raises(_core.EngineError, match="arrays of >f4 are not supported"):
        _core.run_op("gather_rows", cpu, x=zeros(1, 2, dtype=">f4"), index=INDEX, out=out)
    with pytest.raises(_core.EngineError, match="array of 0 dimensions"):
        _core.run_op("gather_rows", cpu, x=zeros(), index=INDEX, out=out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="gather_rows: out is read-only"):
        _core.run_op("gather_rows", cpu, x=zeros(1, 2), index=INDEX, out=out)


def test_an_op_is_timed_by_repeating_it(cpu: _core.Backend) -> None:
    out = zeros(3, 5)
    us = _core.time_op("gemm", cpu, 0.05, x=zeros(3, 4), weight=zeros(5, 4), out=out)
    assert 0 < us < 1e5
    with pytest.raises(TypeError, match="gemm lacks operand 'out'"):
        _core.time_op("gemm", cpu, 0.05, x=zeros(3, 4), weight=zeros(5, 4))
