"""Embed, norms, rotation and gathers against NumPy, on every instruction set and on a GPU.

On a GPU also against the CPU, value for value; see test_gemm.py for products."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from conftest import Tolerance, run_beside_cpu, skip_what_no_gpu_does
from nanoflow import _core
from reference import decode, encode, poisoned, randn, rounded, with_gaps

ROWS = (1, 3, 127, 128, 129)
EPS = 1e-5
SANITIZER = pytest.mark.sanitizer

Rng = np.random.Generator

NORMS = [
    *product(ROWS, (24, 576)),
    (17, 1),
    (17, 67),
    (128, 2048),
    (300, 4096),
    (129, 5120),
    (127, 8192),
    (3, 16384),
    pytest.param(5, 64, marks=SANITIZER),
    pytest.param(129, 4096, marks=SANITIZER),
]


@pytest.mark.parametrize("hidden", [24, 67, pytest.param(576, marks=SANITIZER)])
@pytest.mark.parametrize("rows", [*ROWS, 700])
def test_embed_reads_the_table_and_the_pool(
    backend: _core.Backend, dtype: str, rng: Rng, rows: int, hidden: int
) -> None:
    skip_what_no_gpu_does(backend, "any", hidden)
    table = randn(rng, dtype, 1000, hidden)
    pool = rng.integers(0, 1000, 64, np.int32)
    tokens = rng.integers(-64, 1000, rows, np.int32)
    out = poisoned((rows, hidden), dtype)
    run_beside_cpu(backend, "embed", 0, tokens=tokens, token_pool=pool, table=table, out=out)
    np.testing.assert_array_equal(decode(out), reference.embed(tokens, pool, decode(table)))


@pytest.mark.parametrize("hidden", [67, 576])
def test_embeddings_are_scaled_as_gemmas_are(
    backend: _core.Backend, dtype: str, tolerance: Tolerance, rng: Rng, hidden: int
) -> None:
    skip_what_no_gpu_does(backend, dtype, hidden)
    table, pool = randn(rng, dtype, 50, hidden), np.zeros(1, np.int32)
    tokens, scale = rng.integers(0, 50, 33, np.int32), 576**0.5 + 0.3
    out = poisoned((33, hidden), dtype)
    run_beside_cpu(
        backend, "embed", 0, tokens=tokens, token_pool=pool, table=table, out=out, scale=scale
    )
    tolerance.check(out, decode(table)[tokens] * rounded(np.float32(scale), dtype))


@pytest.mark.parametrize("hidden", [67, pytest.param(576, marks=SANITIZER)])
@pytest.mark.parametrize("rows", [*ROWS, 700])
def test_gather_rows(backend: _core.Backend, dtype: str, rng: Rng, rows: int, hidden: int) -> None:
    skip_what_no_gpu_does(backend, "any", hidden)
    x = randn(rng, dtype, 400, hidden)
    index = rng.integers(-1, 400, rows, np.int32)
    out = with_gaps(poisoned((rows, hidden), dtype))
    run_beside_cpu(backend, "gather_rows", 0, x=with_gaps(x), index=index, out=out)
    np.testing.assert_array_equal(decode(out), np.where(index[:, None] < 0, 0, decode(x)[index]))


@pytest.mark.parametrize(("rows", "hidden"), NORMS)
def test_rms_norm(
    backend: _core.Backend, dtype: str, tolerance: Tolerance, rng: Rng, rows: int, hidden: int
) -> None:
    skip_what_no_gpu_does(backend, dtype, hidden)
    x, weight = randn(rng, dtype, rows, hidden), randn(rng, dtype, hidden)
    out = with_gaps(poisoned((rows, hidden), dtype))
    run_beside_cpu(backend, "rms_norm", 5e-3, x=with_gaps(x), out=out, weight=weight, eps=EPS)
    tolerance.check(out, reference.rms_norm(decode(x), decode(weight), EPS, dtype))


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("rows", "hidden"), [(3, 24), (17, 67), (129, 640), (9, 4096)])
def test_rms_norm_adds_and_counts_its_weights_from_one(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    rows: int,
    hidden: int,
    unit_offset: bool,
    accumulate: bool,
) -> None:
    skip_what_no_gpu_does(backend, dtype, hidden)
    x, weight = randn(rng, dtype, rows, hidden), randn(rng, dtype, hidden)
    before = randn(rng, dtype, rows, hidden)
    out = with_gaps(before.copy() if accumulate else poisoned((rows, hidden), dtype))
    run_beside_cpu(
        backend,
        "rms_norm",
        2e-2,
        x=with_gaps(x),
        out=out,
        weight=weight,
        eps=EPS,
        unit_offset=unit_offset,
        accumulate=accumulate,
    )
    normed = reference.rms_norm(decode(x), decode(weight), EPS, dtype, unit_offset)
    tolerance.check(out, normed + (decode(before) if accumulate else 0.0))


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


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size"),
    [
        (6, 2, 2, 5),
        (6, 2, 10, 16),
        (9, 3, 64, 16),
        (8, 8, 128, 16),
        (2, 2, 128, 1),
        (4, 1, 256, 16),
        pytest.param(32, 8, 128, 64, marks=SANITIZER),
    ],
)
@pytest.mark.parametrize("norm", ["", "norms", "norms with unit offset"])
@pytest.mark.parametrize("rows", ROWS)
def test_rope_append(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    norm: str,
) -> None:
    skip_what_no_gpu_does(backend, dtype, head_dim)
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
    has_norms, unit_offset = bool(norm), "offset" in norm
    norms = (
        {name: randn(rng, dtype, head_dim) for name in ("q_norm", "k_norm")} if has_norms else {}
    )
    run_beside_cpu(
        backend,
        "rope_append",
        5e-3 if has_norms else 1e-3,  # sums in another order; products and sums may be fused
        qkv=qkv,
        positions=positions,
        kv_slots=slots,
        cos_sin=cos_sin,
        k_cache=cache.k_cache,
        v_cache=cache.v_cache,
        **norms,
        **({"norm_eps": EPS, "norm_unit_offset": unit_offset} if has_norms else {}),
    )
    real = ~is_padding
    after = decode(qkv).reshape(before.shape)
    normed = before[real, :-kv_heads]
    if has_norms:
        weights = [decode(norms["q_norm"])] * heads + [decode(norms["k_norm"])] * kv_heads
        exact = reference.rms_norm(normed, np.stack(weights), EPS, dtype, unit_offset)
        normed = rounded(exact, dtype)
    rotated = reference.rotate(normed, cos_sin[positions[real]])
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


def test_norms_of_rows_are_the_same_at_any_width_and_split(
    backend: _core.Backend, dtype: str, rng: Rng
) -> None:
    skip_what_no_gpu_does(backend, dtype)
    x, weight = randn(rng, dtype, 37, 192), randn(rng, dtype, 192)

    def run(rows: NDArray[Any], width: int) -> NDArray[Any]:
        out = poisoned(rows.shape, dtype)
        _core.run_op("rms_norm", backend, width=width, x=rows, out=out, weight=weight, eps=EPS)
        return out

    whole = run(x, 1)
    for width in (2, 3):
        np.testing.assert_array_equal(run(x, width), whole)
    parts = [run(part, 2) for part in np.split(x, [1, 2, 19])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
