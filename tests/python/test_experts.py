"""Routing, sorting, grouped products and their sum against NumPy, on every instruction set and on a
GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from conftest import Tolerance, run_beside_cpu, skip_what_no_gpu_does
from nanoflow import _core
from reference import decode, encode, poisoned, randn, with_gaps

Rng = np.random.Generator

SANITIZER = pytest.mark.sanitizer
# The share of values that sums in another order round to another side.
DIFFERING = {"float32": 1.0, "bfloat16": 0.05, "float16": 0.1}
# rows, experts, experts of a row
ROUTES = [
    (1, 8, 2),
    (37, 8, 2),
    (300, 128, 8),
    (129, 60, 4),
    (5, 4, 4),
    (1025, 257, 1),
    pytest.param(70, 16, 3, marks=SANITIZER),
]
# rows of each expert, depth, columns
GROUPS = [
    ([3], 64, 96),
    ([0, 1, 0, 5], 64, 16),
    ([17, 0, 130, 1, 64, 0, 128, 257], 576, 160),
    ([1] * 60, 192, 48),
    ([2, 200], 1024, 320),
    ([0, 1, 0], 64, 32),
    ([700, 300, 1, 0], 128, 528),
    pytest.param([5, 0, 140], 64, 160, marks=SANITIZER),
]


def routed(rng: Rng, rows: int, experts: int, active: int) -> NDArray[np.int32]:
    """[T, A] distinct experts of each row."""
    ranks = rng.standard_normal((rows, experts)).argsort(axis=1)
    return np.ascontiguousarray(ranks[:, :active].astype(np.int32))


def offsets_of(counts: list[int]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("rows", "experts", "active"), ROUTES)
def test_route_experts(
    backend: _core.Backend, rng: Rng, rows: int, experts: int, active: int, renormalize: bool
) -> None:
    logits = (2 * rng.standard_normal((rows, experts))).astype(np.float32)
    logits[rows // 2] = logits[rows // 2, 0]  # all tie
    chosen = np.full((rows, active), -1, np.int32)
    weights = np.full((rows, active), np.nan, np.float32)
    _core.run_op(
        "route_experts",
        backend,
        logits=with_gaps(logits),
        experts=chosen,
        weights=weights,
        renormalize=renormalize,
    )
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :active]
    np.testing.assert_array_equal(chosen, expected)
    exact = np.exp(logits.astype(np.float64))
    exact = np.take_along_axis(exact / exact.sum(axis=1, keepdims=True), expected, axis=1)
    if renormalize:
        exact /= exact.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, exact, rtol=5e-6)


@pytest.mark.sanitizer
def test_rows_that_are_not_finite_get_experts_and_weights_of_nan(backend: _core.Backend) -> None:
    logits = np.zeros((6, 8), np.float32)
    logits[0, 3] = np.nan
    logits[1] = np.nan
    logits[2, 5] = np.inf
    logits[3] = -np.inf
    logits[4, :6] = -np.inf
    logits[5] = np.arange(8)
    experts = np.full((6, 3), -1, np.int32)
    weights = np.zeros((6, 3), np.float32)
    _core.run_op(
        "route_experts", backend, logits=logits, experts=experts, weights=weights, renormalize=True
    )
    assert experts.tolist() == [[0, 1, 2], [0, 1, 2], [5, 0, 1], [0, 1, 2], [6, 7, 0], [7, 6, 5]]
    assert np.isnan(weights[:4]).all()
    np.testing.assert_allclose(weights[4], [0.5, 0.5, 0.0])


@pytest.mark.parametrize(("rows", "experts", "active"), [*ROUTES, (4000, 8, 8)])
def test_sort_by_expert(
    backend: _core.Backend, rng: Rng, rows: int, experts: int, active: int
) -> None:
    chosen = routed(rng, rows, experts, active)
    offsets = np.full(experts + 1, -1, np.int32)
    sources = np.full(rows * active, -1, np.int32)
    places = np.full((rows, active), -1, np.int32)
    run_beside_cpu(
        backend,
        "sort_by_expert",
        0,
        experts=chosen,
        offsets=offsets,
        sources=sources,
        places=places,
    )
    order = np.argsort(chosen.reshape(-1), kind="stable")
    counts = np.bincount(chosen.reshape(-1), minlength=experts)
    np.testing.assert_array_equal(offsets, offsets_of(counts.tolist()))
    np.testing.assert_array_equal(sources, order // active)
    np.testing.assert_array_equal(places.reshape(-1)[order], np.arange(rows * active))


@pytest.mark.parametrize("op", ["grouped_gemm", "grouped_gemm_silu_mul"])
@pytest.mark.parametrize(("counts", "depth", "columns"), GROUPS)
def test_grouped_products(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    counts: list[int],
    depth: int,
    columns: int,
    op: str,
) -> None:
    skip_what_no_gpu_does(backend, dtype, depth)
    is_silu_mul = op == "grouped_gemm_silu_mul"
    offsets = offsets_of(counts)
    shape = (len(counts), columns * (2 if is_silu_mul else 1), depth)
    weight = encode(rng.standard_normal(shape, np.float32) / np.sqrt(depth), dtype)
    x = randn(rng, dtype, int(offsets[-1]), depth)
    out = with_gaps(poisoned((len(x), columns), dtype))
    limit = DIFFERING[dtype]
    run_beside_cpu(backend, op, limit, x=with_gaps(x), weight=weight, offsets=offsets, out=out)
    product = reference.gemm_silu_mul if is_silu_mul else reference.gemm
    parts = [
        product(decode(x[begin:end]), decode(weight[expert]))
        for expert, (begin, end) in enumerate(pairwise(offsets))
    ]
    tolerance.check(out, np.concatenate(parts))


@pytest.mark.parametrize("op", ["grouped_gemm", "grouped_gemm_silu_mul"])
def test_grouped_products_have_the_bits_of_single_ones(
    cpu_backend: _core.Backend, dtype: str, rng: Rng, op: str
) -> None:
    counts, depth, columns = [3, 0, 70, 1, 33], 224, 80
    offsets = offsets_of(counts)
    weight = randn(rng, dtype, len(counts), columns, depth)
    x = randn(rng, dtype, int(offsets[-1]), depth)
    width = columns // 2 if op.endswith("silu_mul") else columns
    expected = poisoned((len(x), width), dtype)
    for expert, (begin, end) in enumerate(pairwise(offsets)):
        for row in range(begin, end):  # one at a time
            rows = slice(row, row + 1)
            single = op.removeprefix("grouped_")
            _core.run_op(single, cpu_backend, x=x[rows], weight=weight[expert], out=expected[rows])
    for lane in (1, 2, 3):
        out = poisoned(expected.shape, dtype)
        operands = {"x": x, "weight": weight, "offsets": offsets, "out": out}
        _core.run_op(op, cpu_backend, width=lane, **operands)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("rows", "active", "hidden"),
    [(1, 2, 64), (37, 2, 576), (129, 8, 2048), pytest.param(9, 3, 72, marks=SANITIZER)],
)
@pytest.mark.parametrize("accumulate", [False, True])
def test_combine_experts(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    rows: int,
    active: int,
    hidden: int,
    accumulate: bool,
) -> None:
    skip_what_no_gpu_does(backend, dtype, hidden)
    x = randn(rng, dtype, rows * active, hidden)
    places = rng.permutation(rows * active).astype(np.int32).reshape(rows, active)
    weights = rng.random((rows, active), np.float32)
    before = randn(rng, dtype, rows, hidden) if accumulate else poisoned((rows, hidden), dtype)
    out = with_gaps(before)
    operands = {"x": with_gaps(x), "places": places, "weights": weights, "out": out}
    run_beside_cpu(backend, "combine_experts", 0.01, **operands, accumulate=accumulate)
    terms = decode(x)[places] * weights[:, :, None].astype(np.float64)
    added = decode(before) if accumulate else 0.0
    tolerance.check(out, added + terms.sum(axis=1))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("route_experts", {"experts": np.zeros((3, 9), np.int32)}, "a row has 1 to 8 experts"),
    ("sort_by_expert", {"sources": np.zeros(5, np.int32)}, r"sources is int32\[5\] but experts"),
    ("sort_by_expert", {"experts": np.full((3, 2), 8, np.int32)}, "row 0 has expert 8 of 8"),
    ("grouped_gemm", {"offsets": np.zeros(3, np.int32)}, r"offsets is int32\[3\] for weight"),
    ("grouped_gemm", {"offsets": np.array([0, 7], np.int32)}, r"expert 0 has rows \[0, 7\) of 6"),
    ("grouped_gemm_silu_mul", {"out": np.zeros((6, 12), np.float32)}, "twice the columns of out"),
    ("combine_experts", {"places": np.full((3, 2), 6, np.int32)}, "row 0 has place 6 of 6"),
]


@pytest.mark.parametrize(("op", "change", "message"), REFUSED)
def test_what_ops_of_experts_refuse(op: str, change: dict[str, Any], message: str) -> None:
    rows = np.zeros((3, 2), np.int32)
    weights = np.zeros((3, 2), np.float32)
    offsets = np.array([0, 6], np.int32)
    x, weight = np.zeros((6, 4), np.float32), np.zeros((1, 16, 4), np.float32)
    operands: dict[str, dict[str, Any]] = {
        "route_experts": {
            "logits": np.zeros((3, 8), np.float32),
            "experts": rows,
            "weights": np.zeros(
                (3, change["experts"].shape[1]) if "experts" in change else (3, 2)
            ).astype(np.float32),
            "renormalize": True,
        },
        "sort_by_expert": {
            "experts": rows,
            "offsets": np.zeros(9, np.int32),
            "sources": np.zeros(6, np.int32),
            "places": rows.copy(),
        },
        "grouped_gemm": {
            "x": x,
            "weight": weight,
            "offsets": offsets,
            "out": np.zeros((6, 16), np.float32),
        },
        "grouped_gemm_silu_mul": {"x": x, "weight": weight, "offsets": offsets, "out": x},
        "combine_experts": {
            "x": x,
            "places": rows,
            "weights": weights,
            "out": np.zeros((3, 4), np.float32),
        },
    }
    with pytest.raises(_core.EngineError, match=message):
        _core.run_op(op, _core.Backend("cpu", threads=1), **(operands[op] | change))
