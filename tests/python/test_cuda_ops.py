"""What is particular to ops on a GPU; test_kernels.py and others test every op on every device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import has_cuda
from nanoflow import _core
from reference import decode, poisoned, randn

pytestmark = pytest.mark.skipif(not has_cuda(), reason="no GPU that nanoflow can use")

EPS = 1e-5

Rng = np.random.Generator


@pytest.fixture(scope="module")
def gpu() -> _core.Backend:
    return _core.Backend("cuda")


@pytest.fixture(scope="module")
def cpu() -> _core.Backend:
    return _core.Backend("cpu")


def test_the_backend_describes_itself(gpu: _core.Backend) -> None:
    assert gpu.device == "cuda:0"
    assert gpu.description.startswith("cuda:0 (") and "SMs)" in gpu.description
    assert gpu.width >= 8 and gpu.free_memory > 0


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(_core.EngineError, match="device 'cuda:99' does not exist"):
        _core.Backend("cuda:99")
    with pytest.raises(_core.EngineError, match="options of the CPU backend"):
        _core.Backend("cuda", threads=2)


def test_rows_that_do_not_exist_read_as_nan(gpu: _core.Backend, rng: Rng) -> None:
    table, pool = randn(rng, "bfloat16", 10, 64), np.array([3, 10, -1], np.int32)
    out = poisoned((6, 64), "bfloat16")
    tokens = np.array([9, 10, -1, -2, -3, -4], np.int32)
    _core.run_op("embed", gpu, tokens=tokens, token_pool=pool, table=table, out=out)
    assert np.isnan(decode(out)[[1, 3, 4, 5]]).all()
    np.testing.assert_array_equal(out[[0, 2]], table[[9, 3]])
    _core.run_op("gather_rows", gpu, x=table, index=np.array([10], np.int32), out=out[:1])
    assert np.isnan(decode(out[:1])).all()


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
