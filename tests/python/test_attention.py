"""Paged attention against NumPy, and the rule that how rows are batched changes no bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from conftest import Tolerance, is_gpu, skip_what_no_gpu_does
from nanoflow import _core
from reference import PagedCache, decode, encode, poisoned

Rng = np.random.Generator


@dataclass(frozen=True)
class Problem:
    """Requests whose last rows are in the step: one row is a decode, more are a prefill chunk."""

    q: NDArray[Any]  # [T, Hq, D], the rows of all requests in turn
    rows: tuple[int, ...]
    cache: PagedCache
    dtype: str
    window: int = 0

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)

    def expected(self) -> NDArray[np.float64]:
        parts = []
        for request, queries in enumerate(np.split(decode(self.q), np.cumsum(self.rows)[:-1])):
            k = self.cache.gather(self.cache.k_cache, request)
            v = self.cache.gather(self.cache.v_cache, request)
            parts.append(reference.attention(queries, k, v, self.scale, self.window))
        return np.concatenate(parts)


def make_problem(
    rng: Rng,
    dtype: str,
    rows: Sequence[int],
    kv_len: Sequence[int],
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    window: int = 0,
) -> Problem:
    cache = reference.paged_cache(
        rng, kv_len, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    q = encode(2 * rng.standard_normal((sum(rows), heads, head_dim)), dtype)
    return Problem(q=q, rows=tuple(rows), cache=cache, dtype=dtype, window=window)


def run(
    backend: _core.Backend,
    problem: Problem,
    *,
    width: int = 0,
    row_begin: Sequence[int] | None = None,
    total_rows: int = 0,
    segments: Sequence[int] | None = None,
    segment_range: tuple[int, int] = (0, 1),
) -> NDArray[Any]:
    """Output of all rows; q lies in a buffer with room for k and v beside it, as qkv does."""
    skip_what_no_gpu_does(backend, problem.dtype)
    is_power = problem.cache.page_size.bit_count() == 1
    if is_gpu(backend) and not (problem.q.shape[2] in (64, 128, 256) and is_power):
        pytest.skip("on a GPU head_dim is 64, 128 or 256 and a page size a power of two")
    if row_begin is None:
        row_begin = [0, *np.cumsum(problem.rows)[:-1]]
    cache, (_, heads, head_dim) = problem.cache, problem.q.shape
    columns = heads * head_dim
    qkv = poisoned((total_rows or sum(problem.rows), columns + 2 * head_dim), problem.dtype)
    out = poisoned((len(qkv), columns), problem.dtype)
    taken = np.concatenate([b + np.arange(n) for b, n in zip(row_begin, problem.rows, strict=True)])
    qkv[taken, :columns] = problem.q.reshape(-1, columns)
    spare = [-7] * 3  # tables are longer than what is in use
    _core.run_op(
        "attention",
        backend,
        width=width,
        q=qkv[:, :columns],
        out=out,
        k_cache=cache.k_cache,
        v_cache=cache.v_cache,
        segment_requests=np.array(segments or [0, len(problem.rows)], np.int32),
        row_begin=np.array([*row_begin, *spare], np.int32),
        row_count=np.array([*problem.rows, *spare], np.int32),
        kv_len=np.array([*cache.kv_len, *spare], np.int32),
        page_indptr=np.array([*cache.page_indptr, *spare], np.int32),
        page_indices=np.array([*cache.page_indices, *spare], np.int32),
        segment_begin=segment_range[0],
        segment_end=segment_range[1],
        scale=problem.scale,
        window=problem.window,
    )
    untouched = np.ones(len(out), bool)
    untouched[taken] = False
    assert np.isnan(decode(out)[untouched]).all()
    attended: NDArray[Any] = out[taken].reshape(problem.q.shape)
    return attended


SHAPES = [
    # heads, kv_heads, head_dim, page_size
    pytest.param(9, 3, 64, 64, marks=pytest.mark.sanitizer),
    pytest.param(8, 2, 128, 16, marks=pytest.mark.sanitizer),
    (4, 4, 128, 64),
    (8, 1, 128, 8),
    pytest.param(4, 1, 256, 16, marks=pytest.mark.sanitizer),
    (6, 2, 256, 8),
    (4, 4, 256, 64),
    (6, 2, 64, 1),
    (4, 4, 32, 5),
    (6, 1, 80, 48),
    (5, 1, 6, 7),
    (2, 2, 96, 1),
    (40, 1, 64, 16),
]


@pytest.mark.parametrize("heads, kv_heads, head_dim, page_size", SHAPES)
def test_attention_of_a_mixed_batch(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
) -> None:
    """Decodes and prefill chunks whose keys end at, before and after pages and blocks of keys."""
    rows = [1, 1, 1, 1, 1, 1, 3, 17, 33, 127]
    kv_len = [1, 15, 16, 17, 64, 600, 3, 81, 65, 190]
    problem = make_problem(
        rng,
        dtype,
        rows,
        kv_len,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
    )
    tolerance.check(run(backend, problem), problem.expected())


@pytest.mark.parametrize("window", [0, 150])
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, page_size",
    [(8, 2, 128, 64), (24, 24, 64, 32), (4, 4, 128, 2), (4, 1, 256, 64), (2, 1, 256, 4)],
)
def test_prompts_of_many_blocks_of_rows_and_keys(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    window: int,
) -> None:
    """With 24 KV heads there are more blocks than SMs of a GPU."""
    problem = make_problem(
        rng,
        dtype,
        [300, 1, 130, 2],
        [1030, 700, 130, 513],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        window=window,
    )
    tolerance.check(run(backend, problem), problem.expected())


@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_decode_of_every_context(
    backend: _core.Backend, dtype: str, tolerance: Tolerance, rng: Rng, head_dim: int
) -> None:
    kv_len = [*range(1, 200, 3), 255, 256, 257, 511, 512, 513, 1025, 4097, 8192]
    problem = make_problem(
        rng, dtype, [1] * len(kv_len), kv_len, heads=3, kv_heads=1, head_dim=head_dim
    )
    tolerance.check(run(backend, problem), problem.expected())


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(3, 1, 128), (3, 1, 256), (2, 2, 256)])
def test_rows_around_a_block_at_contexts_around_blocks(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    rows = [1, 127, 128, 129, 1, 127, 128, 129]
    kv_len = [1, 127, 128, 129, 2048, 513, 257, 640]
    problem = make_problem(
        rng, dtype, rows, kv_len, heads=heads, kv_heads=kv_heads, head_dim=head_dim
    )
    tolerance.check(run(backend, problem), problem.expected())


@pytest.mark.parametrize("window", [1, 16, 17, 63, 64, 100, 1000])
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(9, 3, 64), (8, 2, 128), (4, 1, 256), (6, 1, 80)]
)
def test_a_row_sees_the_last_keys_of_its_window(
    backend: _core.Backend,
    dtype: str,
    tolerance: Tolerance,
    rng: Rng,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
) -> None:
    rows = [1, 1, 1, 1, 1, 4, 33, 127, 200]
    kv_len = [1, 16, 63, 64, 600, 301, 65, 390, 200]
    problem = make_problem(
        rng,
        dtype,
        rows,
        kv_len,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
    )
    tolerance.check(run(backend, problem), problem.expected())


def test_a_window_over_all_keys_changes_no_bit(
    backend: _core.Backend, dtype: str, rng: Rng
) -> None:
    problem = make_problem(rng, dtype, [1, 70], [200, 130])
    whole = run(backend, problem)
    np.testing.assert_array_equal(run(backend, replace(problem, window=200)), whole)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("head_dim", [64, 80, 96])
def test_how_a_prefill_is_cut_changes_no_bit(
    cpu_backend: _core.Backend, dtype: str, rng: Rng, head_dim: int, window: int
) -> None:
    length = 211
    problem = make_problem(
        rng, dtype, [length], [length], head_dim=head_dim, heads=9, kv_heads=3, window=window
    )
    whole = run(cpu_backend, problem, width=1)
    cuts = [0, 1, 2, 63, 64, 65, 130, 194, 210, length]
    for begin, end in pairwise(cuts):
        cache = problem.cache
        part = Problem(
            q=problem.q[begin:end],
            rows=(end - begin,),
            cache=PagedCache(
                cache.k_cache,
                cache.v_cache,
                np.array([end], np.int32),
                cache.page_indptr,
                cache.page_indices,
            ),
            dtype=dtype,
            window=window,
        )
        np.testing.assert_array_equal(run(cpu_backend, part), whole[begin:end])


def test_batch_and_width_change_no_bit(cpu_backend: _core.Backend, dtype: str, rng: Rng) -> None:
    rows, kv_len = (1, 5, 1, 70), (100, 77, 3, 130)
    problem = make_problem(rng, dtype, rows, kv_len)
    together = run(cpu_backend, problem, width=1)
    for width in (2, 3):
        np.testing.assert_array_equal(run(cpu_backend, problem, width=width), together)
    first = 0
    for request, count in enumerate(rows):
        pages = problem.cache.page_indptr[request : request + 2]
        alone = Problem(
            q=problem.q[first : first + count],
            rows=(count,),
            cache=PagedCache(
                problem.cache.k_cache,
                problem.cache.v_cache,
                problem.cache.kv_len[request : request + 1],
                (pages - pages[0]).astype(np.int32),
                problem.cache.page_indices[pages[0] : pages[1]],
            ),
            dtype=dtype,
        )
        np.testing.assert_array_equal(run(cpu_backend, alone), together[first : first + count])
        first += count


def test_page_size_changes_no_bit(backend: _core.Backend, dtype: str) -> None:
    results = []
    for page_size in (1, 7, 16, 64, 256):
        rng = np.random.default_rng(3)
        dense = encode(rng.standard_normal((2, 150, 2, 64)), dtype)
        problem = make_problem(rng, dtype, [40], [150], page_size=page_size)
        slots = problem.cache.slots(0, np.arange(150))
        problem.cache.k_cache[slots // page_size, :, slots % page_size] = dense[0]
        problem.cache.v_cache[slots // page_size, :, slots % page_size] = dense[1]
        q = encode(np.random.default_rng(4).standard_normal((40, 6, 64)), dtype)
        results.append(run(backend, Problem(q, (40,), problem.cache, dtype)))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("head_dim", [64, 256])
def test_segments_and_padding(
    backend: _core.Backend, dtype: str, tolerance: Tolerance, rng: Rng, head_dim: int
) -> None:
    """Rows are found by row_begin; only the requests of the op's segments are computed."""
    rows, kv_len, begin = (1, 1, 9), (20, 70, 40), (0, 4, 8)
    problem = make_problem(rng, dtype, rows, kv_len, head_dim=head_dim)
    options: dict[str, Any] = {"row_begin": begin, "total_rows": 20, "segments": [0, 1, 1, 3]}
    expected = problem.expected()
    both = run(backend, problem, **options, segment_range=(0, 3))
    tolerance.check(both, expected)
    last = run(backend, problem, **options, segment_range=(2, 3))
    if is_gpu(backend):  # cuts the keys of all requests of an op into equal chunks
        tolerance.check(last[1:], expected[1:])
    else:
        np.testing.assert_array_equal(last[1:], both[1:])
    assert np.isnan(decode(last[:1])).all()
    nothing = run(backend, problem, **options, segment_range=(1, 2))
    assert np.isnan(decode(nothing)).all()


@pytest.mark.parametrize(
    "head_dim, page_size", [(64, 16), (128, 64), (128, 4), (256, 16), (256, 4)]
)
def test_later_values_never_reach_earlier_rows(
    backend: _core.Backend, dtype: str, head_dim: int, page_size: int
) -> None:
    """A key or value that is not finite spoils the rows that see it, and no other."""
    rng = np.random.default_rng(5)
    problem = make_problem(rng, dtype, [100], [100], head_dim=head_dim, page_size=page_size)
    clean = run(backend, problem)
    for view, value in ((problem.cache.v_cache, np.inf), (problem.cache.k_cache, np.nan)):
        slot = problem.cache.slots(0, np.array([70]))
        page = (slot // page_size, slice(None), slot % page_size)
        kept = view[page].copy()
        view[page] = encode(np.full(kept.shape, value), dtype)
        spoilt = run(backend, problem)
        view[page] = kept
        np.testing.assert_array_equal(spoilt[:70], clean[:70])
        assert not np.isfinite(decode(spoilt[70:])).any()


@pytest.mark.parametrize("head_dim", [64, 256])
def test_values_before_the_window_never_reach_later_rows(
    backend: _core.Backend, dtype: str, rng: Rng, head_dim: int
) -> None:
    problem = make_problem(rng, dtype, [100, 1], [100, 90], head_dim=head_dim, window=20)
    clean = run(backend, problem)
    for view, value in ((problem.cache.v_cache, np.inf), (problem.cache.k_cache, np.nan)):
        for request, sees in ((0, slice(37, 57)), (1, slice(0, 0))):
            slot = problem.cache.slots(request, np.array([37]))
            page = (slot // 16, slice(None), slot % 16)
            kept = view[page].copy()
            view[page] = encode(np.full(kept.shape, value), dtype)
            spoilt = run(backend, problem)
            view[page] = kept
            is_spoilt = np.zeros(len(clean), bool)
            is_spoilt[sees] = True
            np.testing.assert_array_equal(spoilt[~is_spoilt], clean[~is_spoilt])
            assert not np.isfinite(decode(spoilt[is_spoilt])).any()


def test_large_scores_do_not_overflow(
    backend: _core.Backend, dtype: str, tolerance: Tolerance, rng: Rng
) -> None:
    problem = make_problem(rng, dtype, [1, 40], [300, 90])
    problem = Problem(encode(20 * decode(problem.q), dtype), problem.rows, problem.cache, dtype)
    actual, expected = decode(run(backend, problem)), problem.expected()
    assert np.isfinite(actual).all()
    tolerance.check(encode(actual, dtype), expected)
