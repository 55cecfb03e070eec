"""Ops on a GPU, in the sizes of real models, against NumPy and against the CPU backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from conftest import TOLERANCES, has_cuda
from nanoflow import _core
from reference import decode, encode, poisoned

pytestmark = pytest.mark.skipif(not has_cuda(), reason="no GPU that nanoflow can use")

DTYPES = ("bfloat16", "float16")
ROWS = (1, 127, 128, 129, 700)
HIDDEN = (64, 576, 2048, 4096, 5120, 8192, 16384)
EPS = 1e-5

Rng = np.random.Generator


@pytest.fixture(scope="module")
def gpu() -> _core.Backend:
    return _core.Backend("cuda")


@pytest.fixture(scope="module")
def cpu() -> _core.Backend:
    return _core.Backend("cpu")


def randn(rng: Rng, dtype: str, *shape: int) -> NDArray[Any]:
    return encode(rng.standard_normal(shape, np.float32), dtype)


def sliced(array: NDArray[Any]) -> NDArray[Any]:
    """The same rows as a slice of wider ones, as q is of qkv."""
    wide = np.zeros((array.shape[0], array.shape[1] + 24), array.dtype)
    wide[:, 16:-8] = array
    return wide[:, 16:-8]


def differing(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float((decode(a) != decode(b)).mean())


def test_the_backend_describes_itself(gpu: _core.Backend) -> None:
    assert gpu.device == "cuda:0"
    assert gpu.description.startswith("cuda:0 (") and "SMs)" in gpu.description
    assert gpu.width >= 8 and gpu.free_memory > 0


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(_core.EngineError, match="device 'cuda:99' does not exist"):
        _core.Backend("cuda:99")
    with pytest.raises(_core.EngineError, match="options of the CPU backend"):
        _core.Backend("cuda", threads=2)


@pytest.mark.parametrize("dtype", (*DTYPES, "float32"))
@pytest.mark.parametrize("rows", ROWS)
def test_embed_and_gather(gpu: _core.Backend, rng: Rng, dtype: str, rows: int) -> None:
    table = randn(rng, dtype, 1000, 576)
    pool = rng.integers(0, 1000, 64, np.int32)
    tokens = rng.integers(-64, 1000, rows, np.int32)
    out = poisoned((rows, 576), dtype)
    _core.run_op("embed", gpu, tokens=tokens, token_pool=pool, table=table, out=out)
    np.testing.assert_array_equal(decode(out), reference.embed(tokens, pool, decode(table)))

    index = rng.integers(-1, 1000, rows, np.int32)
    out = sliced(poisoned((rows, 576), dtype))
    _core.run_op("gather_rows", gpu, x=table, index=index, out=out)
    np.testing.assert_array_equal(
        decode(out), np.where(index[:, None] < 0, 0, decode(table)[index])
    )


def test_rows_that_do_not_exist_read_as_nan(gpu: _core.Backend, rng: Rng) -> None:
    table, pool = randn(rng, "bfloat16", 10, 64), np.array([3, 10, -1], np.int32)
    out = poisoned((6, 64), "bfloat16")
    tokens = np.array([9, 10, -1, -2, -3, -4], np.int32)
    _core.run_op("embed", gpu, tokens=tokens, token_pool=pool, table=table, out=out)
    assert np.isnan(decode(out)[[1, 3, 4, 5]]).all()
    np.testing.assert_array_equal(out[[0, 2]], table[[9, 3]])
    _core.run_op("gather_rows", gpu, x=table, index=np.array([10], np.int32), out=out[:1])
    assert np.isnan(decode(out[:1])).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
def test_norms(
    gpu: _core.Backend, cpu: _core.Backend, rng: Rng, dtype: str, rows: int, hidden: int
) -> None:
    x, weight = randn(rng, dtype, rows, hidden), randn(rng, dtype, hidden)
    out, on_cpu = poisoned(x.shape, dtype), poisoned(x.shape, dtype)
    _core.run_op("rms_norm", gpu, x=sliced(x), out=out, weight=weight, eps=EPS)
    TOLERANCES[dtype].check(out, reference.rms_norm(decode(x), decode(weight), EPS, dtype))
    _core.run_op("rms_norm", cpu, x=x, out=on_cpu, weight=weight, eps=EPS)
    assert differing(out, on_cpu) < 5e-3  # mean squares summed in another order


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias, accumulate", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("depth, columns", [(64, 96), (576, 960), (4096, 1024)])
@pytest.mark.parametrize("rows", ROWS)
def test_gemm_adds_bias_and_old_values(
    gpu: _core.Backend,
    rng: Rng,
    dtype: str,
    rows: int,
    depth: int,
    columns: int,
    has_bias: bool,
    accumulate: bool,
) -> None:
    x, bias = randn(rng, dtype, rows, depth), randn(rng, dtype, columns)
    weight = encode(rng.standard_normal((columns, depth), np.float32) / np.sqrt(depth), dtype)
    before = randn(rng, dtype, rows, columns)
    out = sliced(before if accumulate else poisoned(before.shape, dtype))
    operands = {"bias": bias} if has_bias else {}
    _core.run_op(
        "gemm", gpu, x=sliced(x), weight=weight, out=out, accumulate=accumulate, **operands
    )
    expected = reference.gemm(decode(x), decode(weight), decode(bias) if has_bias else 0.0)
    TOLERANCES[dtype].check(out, expected + (decode(before) if accumulate else 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth, columns", [(64, 96), (576, 1536), (4096, 1792)])
@pytest.mark.parametrize("rows", ROWS)
def test_gemm_silu_mul(
    gpu: _core.Backend,
    cpu: _core.Backend,
    rng: Rng,
    dtype: str,
    rows: int,
    depth: int,
    columns: int,
) -> None:
    x = randn(rng, dtype, rows, depth)
    scale = 3 / np.sqrt(depth)  # products from -15 to 15
    weight = encode(scale * rng.standard_normal((2 * columns, depth), np.float32), dtype)
    out, on_cpu = (poisoned((rows, columns), dtype) for _ in range(2))
    out = sliced(out)
    _core.run_op("gemm_silu_mul", gpu, x=sliced(x), weight=weight, out=out)
    _core.run_op("gemm_silu_mul", cpu, x=x, weight=weight, out=on_cpu)
    TOLERANCES[dtype].check(out, decode(on_cpu))
    assert differing(out, on_cpu) < 2e-2  # float sums in another order
    some = slice(None, None, 97)
    TOLERANCES[dtype].check(out[some], reference.gemm_silu_mul(decode(x[some]), decode(weight)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(9, 3), (32, 8), (2, 2)])
@pytest.mark.parametrize("head_dim, page_size", [(64, 16), (128, 64), (128, 1)])
@pytest.mark.parametrize("rows", ROWS[:4])
def test_rope_append(
    gpu: _core.Backend,
    rng: Rng,
    dtype: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    rows: int,
) -> None:
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
        gpu,
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
    TOLERANCES[dtype].check(encode(after[real, :-kv_heads], dtype), rotated)
    np.testing.assert_array_equal(after[:, -kv_heads:], before[:, -kv_heads:])
    np.testing.assert_array_equal(after[is_padding], before[is_padding])
    for view, appended in [
        (cache.k_cache, after[:, heads : heads + kv_heads]),
        (cache.v_cache, after[:, heads + kv_heads :]),
    ]:
        taken = decode(view[slots[real] // page_size, :, slots[real] % page_size])
        np.testing.assert_array_equal(taken, appended[real])
        assert np.isfinite(decode(view)).sum() == real.sum() * kv_heads * head_dim


def sampling(rng: Rng, rows: int, **options: Any) -> dict[str, Any]:
    def table(name: str, default: float, dtype: type) -> NDArray[Any]:
        values = np.broadcast_to(options.get(name, default), rows)
        return np.ascontiguousarray(values.astype(dtype))

    return {
        "slots": rng.permutation(rows).astype(np.int32),
        "temperature": table("temperature", 1.0, np.float32),
        "top_p": table("top_p", 1.0, np.float32),
        "min_p": table("min_p", 0.0, np.float32),
        "top_k": table("top_k", 0, np.int32),
        "seed": rng.integers(0, 2**64, rows, np.uint64),
        "counter": rng.integers(0, 5000, rows, np.int32),
        "banned_indptr": np.arange(rows + 1, dtype=np.int32),
        "banned": rng.integers(0, 30, rows, np.int32),
    }


@pytest.mark.parametrize("vocabulary", [130, 49152, 128256, 151937])
@pytest.mark.parametrize("scale", [0.02, 1.0, 4.0])
def test_samples_are_those_of_the_cpu(
    gpu: _core.Backend, cpu: _core.Backend, rng: Rng, vocabulary: int, scale: float
) -> None:
    """Token for token but where the sums of the two backends round to different sides."""
    rows = 96
    logits = (scale * rng.standard_normal((rows, vocabulary), np.float32)).astype(np.float32)
    tables = sampling(
        rng,
        rows,
        temperature=rng.choice([0.0, 0.3, 0.8, 1.5], rows),
        top_p=rng.choice([1.0, 0.95, 0.5], rows),
        min_p=rng.choice([0.0, 0.0, 0.02], rows),
        top_k=rng.choice([0, 0, 1, 40, 3000], rows),
    )
    results = []
    for backend in (gpu, cpu):
        sampled, pool = np.full(rows, -99, np.int32), np.full(rows, -99, np.int32)
        _core.run_op(
            "sample", backend, logits=logits.copy(), sampled=sampled, token_pool=pool, **tables
        )
        np.testing.assert_array_equal(pool[tables["slots"]], sampled)
        results.append(sampled)
    on_gpu, on_cpu = results
    assert (on_gpu >= 0).all() and (on_gpu != tables["banned"]).all()
    greedy = tables["temperature"] == 0
    np.testing.assert_array_equal(on_gpu[greedy], on_cpu[greedy])
    # A flat row of 150,000 tokens: a draw is decided by the sixth digit of a sum.
    assert (on_gpu != on_cpu).mean() <= (0.1 if scale < 1 else 0.03)
    assert np.abs(on_gpu - on_cpu).max() <= 3 * vocabulary / 1000 or scale >= 1


@pytest.mark.parametrize("width", [1, 8, 100])
def test_a_row_does_not_depend_on_the_lane_or_on_other_rows(
    gpu: _core.Backend, rng: Rng, width: int
) -> None:
    x, weight = randn(rng, "bfloat16", 300, 4096), randn(rng, "bfloat16", 4096)
    logits = 3 * rng.standard_normal((300, 5000), np.float32)
    tables = sampling(rng, 300, top_p=0.9, top_k=100)

    def run(first: int, last: int, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
        out = poisoned((last - first, 4096), "bfloat16")
        _core.run_op("rms_norm", gpu, width=width, x=x[first:last], out=out, weight=weight, eps=EPS)
        sampled, pool = np.zeros(last - first, np.int32), np.zeros(300, np.int32)
        some = {
            name: table[first : last + (name == "banned_indptr")]
            for name, table in tables.items()
            if name != "banned"
        }
        _core.run_op(
            "sample",
            gpu,
            width=width,
            logits=logits[first:last].copy(),
            sampled=sampled,
            token_pool=pool,
            banned=tables["banned"],
            **some,
        )
        return out, sampled

    whole = run(0, 300, 0)
    for first, last in [(0, 300), (17, 18), (100, 291)]:
        part = run(first, last, width)
        np.testing.assert_array_equal(part[0], whole[0][first:last])
        np.testing.assert_array_equal(part[1], whole[1][first:last])


@pytest.mark.parametrize(
    "op, operands, message",
    [
        ("rms_norm", {"x": (2, 60), "out": (2, 60), "weight": (60,), "eps": EPS}, "16 bytes"),
        ("gemm", {"x": (2, 64), "weight": (60, 64), "out": (2, 60)}, "multiples of 16"),
        (
            "gemm_silu_mul",
            {"x": (2, 64), "weight": (32, 64), "out": (2, 24)},
            "needs twice the columns of out",
        ),
    ],
)
def test_what_a_gpu_refuses(
    gpu: _core.Backend, op: str, operands: dict[str, Any], message: str
) -> None:
    arrays = {
        name: np.zeros(shape, np.float16) if isinstance(shape, tuple) else shape
        for name, shape in operands.items()
    }
    with pytest.raises(_core.EngineError, match=message):
        _core.run_op(op, gpu, **arrays)


def test_a_gpu_has_no_float32_norm(gpu: _core.Backend) -> None:
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(_core.EngineError, match="rms_norm on a GPU does not support dtype float32"):
        _core.run_op("rms_norm", gpu, x=x, out=x.copy(), weight=x[0], eps=EPS)
