"""Embed, norms, GEMMs, rotation and gathers against NumPy, on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from conftest import Tolerance
from nanoflow import _core
from reference import decode, encode, poisoned

ROWS = (1, 3, 17, 127)
HIDDEN = (1, 24, 67, 576)
EPS = 1e-5

Rng = np.random.Generator


def randn(rng: Rng, dtype: str, *shape: int) -> NDArray[Any]:
    return encode(rng.standard_normal(shape), dtype)


def with_gaps(array: NDArray[Any]) -> NDArray[Any]:
    """The same rows, further apart in memory."""
    wide = np.zeros((array.shape[0], array.shape[1] + 5), array.dtype)
    wide[:, 3:-2] = array
    return wide[:, 3:-2]


@pytest.mark.parametrize("rows", ROWS)
def test_embed_reads_the_table_and_the_pool(
    backend: _core.Backend, dtype: str, rng: Rng, rows: int
) -> None:
    table = randn(rng, dtype, 50, 24)
    pool = rng.integers(0, 50, 8, np.int32)
    tokens = rng.integers(-8, 50, rows, np.int32)
    out = poisoned((rows, 24), dtype)
    _core.run_op("embed", backend, tokens=tokens, token_pool=pool, table=table, out=out)
    np.testing.assert_array_equal(decode(out), reference.embed(tokens, pool, decode(table)))


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(
    backend: _core.Backend, dtype: str, tolerance: Tolerance, rng: Rng, rows: int, hidden: int
) -> None:
    x, weight = randn(rng, dtype, rows, hidden), randn(rng, dtype, hidden)
    out = poisoned((rows, hidden), dtype)
    _core.run_op("rms_norm", backend, x=with_gaps(x), out=out, weight=weight, eps=EPS)
    tolerance.check(out, reference.rms_norm(decode(x), decode(weight), EPS, dtype))


def test_rms_norm_rounds_as_transformers_does(backend: _core.Backend, rng: Rng) -> None:
    """Rounded to bfloat16 before the weight multiplies it, and again after."""
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = randn(rng, "bfloat16", 64, 576), randn(rng, "bfloat16", 576)
    norm = LlamaRMSNorm(576, EPS).to(torch.bfloat16)
    as_torch = [torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for a in (x, weight)]
    with torch.no_grad():
        norm.weight.copy_(as_torch[1])
        expected = norm(as_torch[0]).view(torch.int16).numpy().view(np.uint16)
    out = poisoned(x.shape, "bfloat16")
    _core.run_op("rms_norm", backend, x=x, out=out, weight=weight, eps=EPS)
    assert (out == expected).mean() > 0.999  # the rest: mean squares summed in another order


@pytest.mark.parametrize("out_dtype", ["same", "float32"])
@pytest.mark.parametrize("inner, columns", [(1, 5), (64, 96), (67, 33), (576, 130)])
@pytest.mark.parametrize("rows", ROWS)
def test_gemm(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    rows: int,
    inner: int,
    columns: int,
    out_dtype: str,
) -> None:
    x = randn(rng, dtype, rows, inner)
    weight = encode(rng.standard_normal((columns, inner)) / np.sqrt(inner), dtype)
    out = with_gaps(poisoned((rows, columns), dtype if out_dtype == "same" else "float32"))
    _core.run_op("gemm", backend, x=with_gaps(x), weight=weight, out=out)
    tolerance.check(out, reference.gemm(decode(x), decode(weight)))


@pytest.mark.parametrize("head_dim, page_size", [(2, 5), (10, 16), (64, 16), (128, 64)])
@pytest.mark.parametrize("rows", ROWS)
def test_rope_append(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    rows: int,
    head_dim: int,
    page_size: int,
) -> None:
    heads, kv_heads = 6, 2
    cache = reference.paged_cache(
        rng, [rows], page_size=page_size, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    cos_sin = reference.rope_table(10000.0 ** -np.linspace(0, 1, head_dim // 2), rows + 40)
    positions = (np.arange(rows) + 40).astype(np.int32)
    slots = cache.slots(0, np.arange(rows))
    is_padding = np.arange(rows) % 5 == 4
    slots[is_padding] = -1
    positions[is_padding] = 10**6
    cache.k_cache[:] = cache.v_cache[:] = poisoned((), dtype)
    qkv = randn(rng, dtype, rows, (heads + 2 * kv_heads) * head_dim)
    before = decode(qkv).reshape(rows, heads + 2 * kv_heads, head_dim)

    _core.run_op(
        "rope_append",
        backend,
        qkv=qkv,
        positions=positions,
        kv_slots=slots,
        cos_sin=cos_sin,
        k_cache=cache.k_cache,
        v_cache=cache.v_cache,
    )
    real = ~is_padding
    after = decode(qkv).reshape(before.shape)
    rotated = reference.rotate(before[real, :-kv_heads], cos_sin[positions[real]])
    tolerance.check(encode(after[real, :-kv_heads], dtype), rotated)
    np.testing.assert_array_equal(after[:, -kv_heads:], before[:, -kv_heads:])
    np.testing.assert_array_equal(after[is_padding], before[is_padding])
    for view, appended in [
        (cache.k_cache, after[:, heads : heads + kv_heads]),
        (cache.v_cache, after[:, heads + kv_heads :]),
    ]:
        taken = decode(view[slots[real] // page_size, :, slots[real] % page_size])
        np.testing.assert_array_equal(taken, appended[real])
        assert np.isfinite(decode(view)).sum() == real.sum() * kv_heads * head_dim


@pytest.mark.parametrize("has_bias, accumulate", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rows", ROWS)
def test_gemm_adds_bias_and_old_values(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    rows: int,
    has_bias: bool,
    accumulate: bool,
) -> None:
    x, bias = randn(rng, dtype, rows, 64), randn(rng, dtype, 96)
    weight = encode(rng.standard_normal((96, 64)) / 8, dtype)
    before = randn(rng, dtype, rows, 96)
    out = before.copy() if accumulate else poisoned(before.shape, dtype)
    operands = {"bias": bias} if has_bias else {}
    _core.run_op("gemm", backend, x=x, weight=weight, out=out, accumulate=accumulate, **operands)
    expected = reference.gemm(decode(x), decode(weight), decode(bias) if has_bias else 0.0)
    tolerance.check(out, expected + (decode(before) if accumulate else 0.0))


@pytest.mark.parametrize("inner, columns", [(1, 8), (64, 96), (67, 24), (576, 1536)])
@pytest.mark.parametrize("rows", ROWS)
def test_gemm_silu_mul(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    rows: int,
    inner: int,
    columns: int,
) -> None:
    x = randn(rng, dtype, rows, inner)
    weight = encode(rng.standard_normal((2 * columns, inner)) / np.sqrt(inner), dtype)
    out = with_gaps(poisoned((rows, columns), dtype))
    _core.run_op("gemm_silu_mul", backend, x=with_gaps(x), weight=weight, out=out)
    tolerance.check(out, reference.gemm_silu_mul(decode(x), decode(weight)))


def silu_mul(backend: _core.Backend, gate: Any, up: Any) -> NDArray[np.float32]:
    """silu(gate) * up of one row, as products with x = 1."""
    weight = reference.interleave(np.asarray(gate, np.float32), np.asarray(up, np.float32))
    out = poisoned((1, len(gate)), "float32")
    x = np.ones((1, 1), np.float32)
    _core.run_op("gemm_silu_mul", backend, x=x, weight=weight[:, None], out=out)
    return out[0]


def test_silu_is_accurate_over_the_whole_range(backend: _core.Backend) -> None:
    gate = np.concatenate([np.linspace(-87, 200, 100004), [-0.0, 1e-40, -1e-30, 3e38]])
    gate = gate.astype(np.float32)
    out = silu_mul(backend, gate, np.ones_like(gate))
    exact = decode(gate)
    np.testing.assert_allclose(out, exact / (1 + np.exp(-exact)), rtol=4e-7, atol=1e-45)


def test_silu_of_what_is_not_finite(backend: _core.Backend) -> None:
    out = silu_mul(backend, [np.inf, np.nan, -1e30, 2] * 2, [1, 1, 1, np.nan] * 2)
    np.testing.assert_array_equal(out, [np.inf, np.nan, 0, np.nan] * 2)


@pytest.mark.parametrize("rows", ROWS)
def test_gather_rows(backend: _core.Backend, dtype: str, rng: Rng, rows: int) -> None:
    x = randn(rng, dtype, 40, 67)
    index = rng.integers(-1, 40, rows, np.int32)
    out = poisoned((rows, 67), dtype)
    _core.run_op("gather_rows", backend, x=with_gaps(x), index=index, out=out)
    np.testing.assert_array_equal(decode(out), np.where(index[:, None] < 0, 0, decode(x)[index]))


@pytest.mark.parametrize("op", ["rms_norm", "gemm_silu_mul", "gemm"])
def test_rows_are_the_same_at_any_width_and_split(
    backend: _core.Backend, dtype: str, rng: Rng, op: str
) -> None:
    x, weight = randn(rng, dtype, 37, 192), randn(rng, dtype, 80, 192)
    columns = {"rms_norm": 192, "gemm_silu_mul": 40, "gemm": 80}[op]

    def run(rows: NDArray[Any], width: int) -> NDArray[Any]:
        out = poisoned((len(rows), columns), dtype)
        operands = {
            "rms_norm": {"x": rows, "weight": weight[0], "eps": EPS},
            "gemm_silu_mul": {"x": rows, "weight": weight},
            "gemm": {"x": rows, "weight": weight},
        }[op]
        _core.run_op(op, backend, width=width, out=out, **operands)
        return out

    whole = run(x, 1)
    for width in (2, 3):
        np.testing.assert_array_equal(run(x, width), whole)
    parts = [run(part, 2) for part in np.split(x, [1, 2, 19])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
