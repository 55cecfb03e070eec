"""Matrix products and what is fused to them against NumPy, on every instruction set and on a GPU.

On a GPU also against the CPU, value for value."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from conftest import Tolerance, is_gpu, run_beside_cpu, skip_what_no_gpu_does
from nanoflow import _core
from reference import decode, encode, poisoned, randn, with_gaps

ROWS = (1, 3, 127, 128, 129)
SANITIZER = pytest.mark.sanitizer
# rows, depth, columns. More rows, and the depth of real models, choose other kernels.
SHAPES = [
    *product(ROWS, (64, 576), (96,)),
    *product((1, 17), (1, 67), (5, 33)),
    (17, 576, 130),
    (300, 576, 480),
    (16, 4096, 256),
    (257, 2048, 128),
    *product((1, 17, 129, 1025), (64,), (6, 33)),  # as logits of experts, or of a vocabulary
    (300, 576, 257),
    (16, 4096, 1001),
    pytest.param(1, 64, 48, marks=SANITIZER),
    pytest.param(70, 64, 45, marks=SANITIZER),
    pytest.param(129, 576, 160, marks=SANITIZER),
]
FUSED_SHAPES = [
    (1, 64, 96),
    (17, 67, 40),
    (128, 576, 96),
    (300, 192, 480),
    (16, 4096, 64),
    pytest.param(129, 576, 160, marks=SANITIZER),
]
# The share of values that sums in another order round to another side.
DIFFERING = {"float32": 1.0, "bfloat16": 0.05, "float16": 0.1}

Rng = np.random.Generator


def skip_unless_it_runs(backend: _core.Backend, dtype: str, depth: int, columns: int) -> None:
    skip_what_no_gpu_does(backend, dtype, depth)
    if is_gpu(backend) and columns % 16:
        pytest.skip(f"{columns} columns of {dtype} on a GPU")


def matrix(rng: Rng, dtype: str, columns: int, depth: int, scale: float = 1.0) -> NDArray[Any]:
    """Products with rows of variance 1 have the variance scale²."""
    values = scale * rng.standard_normal((columns, depth), np.float32) / np.sqrt(depth)
    return encode(values, dtype)


@pytest.mark.parametrize("out_dtype", ["same", "float32"])
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_gemm(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    rows: int,
    depth: int,
    columns: int,
    out_dtype: str,
) -> None:
    if out_dtype == "same":
        skip_unless_it_runs(backend, dtype, depth, columns)
    else:
        skip_what_no_gpu_does(backend, dtype, depth)
    x, weight = randn(rng, dtype, rows, depth), matrix(rng, dtype, columns, depth)
    out_dtype = dtype if out_dtype == "same" else out_dtype
    out = with_gaps(poisoned((rows, columns), out_dtype))
    run_beside_cpu(backend, "gemm", DIFFERING[out_dtype], x=with_gaps(x), weight=weight, out=out)
    tolerance.check(out, reference.gemm(decode(x), decode(weight)))


@pytest.mark.parametrize("has_bias, accumulate", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("rows", "depth", "columns"), FUSED_SHAPES)
def test_gemm_adds_bias_and_old_values(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    rows: int,
    depth: int,
    columns: int,
    has_bias: bool,
    accumulate: bool,
) -> None:
    skip_unless_it_runs(backend, dtype, depth, columns)
    x, weight = randn(rng, dtype, rows, depth), matrix(rng, dtype, columns, depth)
    bias, before = randn(rng, dtype, columns), randn(rng, dtype, rows, columns)
    out = with_gaps(before if accumulate else poisoned(before.shape, dtype))
    operands: dict[str, Any] = {"bias": bias} if has_bias else {}
    operands |= {"x": with_gaps(x), "weight": weight, "out": out, "accumulate": accumulate}
    run_beside_cpu(backend, "gemm", DIFFERING[dtype], **operands)
    expected = reference.gemm(decode(x), decode(weight), decode(bias) if has_bias else 0.0)
    tolerance.check(out, expected + (decode(before) if accumulate else 0.0))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "depth", "columns"), FUSED_SHAPES)
def test_gemm_silu_mul(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    rows: int,
    depth: int,
    columns: int,
    activation: str,
) -> None:
    skip_unless_it_runs(backend, dtype, depth, columns)
    x, weight = randn(rng, dtype, rows, depth), matrix(rng, dtype, 2 * columns, depth)
    out = with_gaps(poisoned((rows, columns), dtype))
    operands: dict[str, Any] = {"x": with_gaps(x), "weight": weight, "out": out}
    operands["activation"] = activation
    run_beside_cpu(backend, "gemm_silu_mul", DIFFERING[dtype], **operands)
    tolerance.check(out, reference.gemm_silu_mul(decode(x), decode(weight), activation))


def test_gelu_is_accurate_over_the_whole_range(cpu_backend: _core.Backend) -> None:
    gate = np.concatenate([np.linspace(-8, 30, 100005), [-0.0, 1e-30, 3e38]]).astype(np.float32)
    out = silu_mul(cpu_backend, gate, np.ones_like(gate), activation="gelu_tanh")
    with np.errstate(over="ignore"):
        expected = reference.gelu_tanh(decode(gate))
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-7)


def silu_mul(backend: _core.Backend, gate: Any, up: Any, **more: Any) -> NDArray[np.float32]:
    """silu(gate) * up of one row, as products with x = 1."""
    weight = reference.interleave(np.asarray(gate, np.float32), np.asarray(up, np.float32))
    out = poisoned((1, len(gate)), "float32")
    x = np.ones((1, 1), np.float32)
    _core.run_op("gemm_silu_mul", backend, x=x, weight=weight[:, None], out=out, **more)
    return out[0]


def test_silu_is_accurate_over_the_whole_range(cpu_backend: _core.Backend) -> None:
    gate = np.concatenate([np.linspace(-87, 200, 100004), [-0.0, 1e-40, -1e-30, 3e38]])
    gate = gate.astype(np.float32)
    out = silu_mul(cpu_backend, gate, np.ones_like(gate))
    exact = decode(gate)
    np.testing.assert_allclose(out, exact / (1 + np.exp(-exact)), rtol=4e-7, atol=1e-45)


def test_silu_of_what_is_not_finite(cpu_backend: _core.Backend) -> None:
    out = silu_mul(cpu_backend, [np.inf, np.nan, -1e30, 2] * 2, [1, 1, 1, np.nan] * 2)
    np.testing.assert_array_equal(out, [np.inf, np.nan, 0, np.nan] * 2)


@pytest.mark.parametrize(("count", "depth"), [(37, 192), (530, 1101)])
@pytest.mark.parametrize("op", ["gemm", "gemm_silu_mul"])
def test_products_of_rows_are_the_same_at_any_width_and_split(
    cpu_backend: _core.Backend, dtype: str, rng: Rng, op: str, count: int, depth: int
) -> None:
    x, weight = randn(rng, dtype, count, depth), randn(rng, dtype, 80, depth)

    def run(rows: NDArray[Any], width: int) -> NDArray[Any]:
        out = poisoned((len(rows), 80 if op == "gemm" else 40), dtype)
        _core.run_op(op, cpu_backend, width=width, x=rows, weight=weight, out=out)
        return out

    whole = run(x, 1)
    for width in (2, 3):
        np.testing.assert_array_equal(run(x, width), whole)
    parts = [run(part, 2) for part in np.split(x, [1, 2, 19, count - 12])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
