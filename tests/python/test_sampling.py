"""The sample op: greedy, what the filters keep, how often each token is drawn, and on what a draw
depends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from nanoflow import _core

Logits = NDArray[np.float32]

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 70},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 40, "min_p": 0.05},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


def sample(
    backend: _core.Backend,
    logits: Logits,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    seed: Any = 0,
    counter: Any = 0,
    slots: NDArray[np.int32] | None = None,
    banned: list[list[int]] | None = None,
    pool: NDArray[np.int32] | None = None,
    width: int = 0,
) -> NDArray[np.int32]:
    """`sampled` of all rows; parameters are one for all rows or one a row. `pool` is written."""
    rows = len(logits)
    banned = banned or [[]] * rows
    sampled = np.full(rows, -99, np.int32)

    def table(values: Any, dtype: type) -> NDArray[Any]:
        return np.ascontiguousarray(np.broadcast_to(values, rows).astype(dtype))

    _core.run_op(
        "sample",
        backend,
        width=width,
        logits=logits.copy(),
        slots=np.arange(rows, dtype=np.int32) if slots is None else slots,
        temperature=table(temperature, np.float32),
        top_p=table(top_p, np.float32),
        min_p=table(min_p, np.float32),
        top_k=table(top_k, np.int32),
        seed=table(seed, np.uint64),
        counter=table(counter, np.int32),
        banned_indptr=np.cumsum([0, *map(len, banned)]).astype(np.int32),
        banned=np.array([token for row in banned for token in row] + [10**9], np.int32),
        token_pool=np.zeros(rows, np.int32) if pool is None else pool,
        sampled=sampled,
    )
    return sampled


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> Logits:
    return np.random.default_rng(seed).normal(0, 2, (rows, vocabulary)).astype(np.float32)


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 1000, 49152])
def test_greedy_takes_the_highest(backend: _core.Backend, vocabulary: int) -> None:
    logits = random_logits(9, vocabulary)
    logits[3] -= 1e4
    logits[4, :-1] = -np.inf
    np.testing.assert_array_equal(
        sample(backend, logits, temperature=0.0, top_k=3, top_p=0.1), logits.argmax(axis=1)
    )


@pytest.mark.parametrize("tied", [[5, 900], [63, 64], [0, 999], [17, 18, 19]])
def test_the_lowest_token_wins_a_tie(backend: _core.Backend, tied: list[int]) -> None:
    logits = random_logits(1, 1000)
    logits[0, tied] = 50.0
    assert sample(backend, logits, temperature=0.0) == tied[0]
    assert sample(backend, logits, top_p=1e-9) == tied[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_sampled(backend: _core.Backend, temperature: float) -> None:
    logits = random_logits(3, 70)
    order = np.argsort(-logits, axis=1)
    banned = [order[0, :5].tolist(), [], order[2, :69].tolist()]
    for counter in range(50):
        sampled = sample(backend, logits, temperature=temperature, banned=banned, counter=counter)
        assert sampled[0] not in banned[0]
        assert sampled[2] == order[2, 69]
    if temperature == 0:
        np.testing.assert_array_equal(sampled[:2], [order[0, 5], order[1, 0]])


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.5}])
def test_rows_that_are_not_finite_fail_alone(
    backend: _core.Backend, options: dict[str, Any]
) -> None:
    logits = random_logits(7, 200)
    logits[1, 199] = np.nan
    logits[2, 0] = np.nan
    logits[3, 77] = np.inf
    logits[4] = -np.inf
    logits[5, :150] = -np.inf
    banned = [[], [], [], [], [], [], list(range(200))]
    pool = np.full(7, -5, np.int32)
    sampled = sample(backend, logits, banned=banned, pool=pool, **options)
    is_bad = np.array([0, 1, 1, 1, 1, 0, 1], bool)
    assert (sampled[is_bad] == reference.INVALID_LOGITS).all()
    assert (pool[is_bad] == 0).all()
    assert (sampled[~is_bad] >= 0).all() and sampled[5] >= 150
    np.testing.assert_array_equal(pool[~is_bad], sampled[~is_bad])


def test_slots_take_samples_and_padding_rows_nothing(backend: _core.Backend) -> None:
    logits = random_logits(4, 100)
    logits[1] = np.nan
    pool = np.full(6, -5, np.int32)
    slots = np.array([4, -1, 0, 2], np.int32)
    sampled = sample(backend, logits, temperature=[0, 1, 0, 0], slots=slots, pool=pool)
    best = logits.argmax(axis=1)
    np.testing.assert_array_equal(sampled, [best[0], -1, best[2], best[3]])
    np.testing.assert_array_equal(pool, [best[2], -5, best[3], -5, best[0], -5])


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("vocabulary", [50, pytest.param(3000, marks=pytest.mark.sanitizer)])
def test_a_draw_inverts_the_filtered_distribution(
    backend: _core.Backend, vocabulary: int, filters: dict[str, Any]
) -> None:
    rows = 60
    logits = random_logits(rows, vocabulary)
    counters = np.arange(rows) * 7
    seed = 2**63 + 5
    banned = [[row % vocabulary] for row in range(rows)]
    sampled = sample(
        backend, logits, temperature=0.8, seed=seed, counter=counters, banned=banned, **filters
    )
    for row, token in enumerate(sampled):
        p = reference.allowed_probabilities(
            logits[row], temperature=0.8, banned=banned[row], **filters
        )
        assert p[token] > 0
        above = p[: token + 1].sum()
        u = reference.uniform(seed, int(counters[row]))
        assert above - p[token] - 1e-5 <= u <= above + 1e-5


@pytest.mark.parametrize("filters", FILTERS)
def test_tokens_are_drawn_as_often_as_they_should_be(
    backend: _core.Backend, filters: dict[str, Any]
) -> None:
    draws, vocabulary = 20000, 130
    logits = random_logits(1, vocabulary, seed=1) / 2
    sampled = sample(
        backend, np.tile(logits, (draws, 1)), seed=99, counter=np.arange(draws), **filters
    )
    p = reference.allowed_probabilities(logits[0], temperature=1.0, **filters)
    counts = np.bincount(sampled, minlength=vocabulary)
    assert counts[p == 0].sum() == 0
    expected = draws * p[p > 0]
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum()
    freedom = (p > 0).sum() - 1
    assert statistic <= freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0])
@pytest.mark.parametrize(
    "filters",
    [{"top_p": 0.9}, {"top_p": 0.99999}, {"top_k": 50}, {"top_k": 2000}, {"min_p": 0.001}],
)
def test_a_large_vocabulary_keeps_what_it_should(
    backend: _core.Backend, scale: float, filters: dict[str, Any]
) -> None:
    """Flat and peaked distributions; the last token that is kept is drawn by a u near 1."""
    vocabulary, draws = 49152, 40
    logits = scale * random_logits(1, vocabulary, seed=3)
    p = reference.allowed_probabilities(logits[0], temperature=1.0, **filters)
    sampled = sample(
        backend, np.tile(logits, (draws, 1)), seed=3, counter=np.arange(draws), **filters
    )
    # Sums of 49,152 floats differ in the sixth digit, so the last few kept may.
    doubtful = np.argsort(-p, kind="stable")[int((p > 0).sum() * 0.999) :]
    assert ((p[sampled] > 0) | np.isin(sampled, doubtful)).all()
    above = np.cumsum(p)[sampled]
    u = np.array([reference.uniform(3, counter) for counter in range(draws)])
    assert (u <= above + 1e-3).all() and (u >= above - p[sampled] - 1e-3).all()


def test_ties_at_the_edges_of_filters(backend: _core.Backend) -> None:
    """top_k keeps all that tie with the last; top_p takes tied tokens from the lowest on."""
    logits = np.full((300, 200), -50, np.float32)
    logits[:, [3, 70, 90, 199]] = 1.0
    counters = np.arange(300)
    assert set(sample(backend, logits, counter=counters, top_k=2)) == {3, 70, 90, 199}
    assert set(sample(backend, logits, counter=counters, top_p=0.5)) == {3, 70}
    assert set(sample(backend, logits, counter=counters, top_p=0.7)) == {3, 70, 90}


@pytest.mark.parametrize("temperature", [1e-30, 1e-5, 0.3, 30.0, 1e30])
def test_extreme_temperatures(backend: _core.Backend, temperature: float) -> None:
    logits = 10 * random_logits(200, 300)
    sampled = sample(backend, logits, temperature=temperature, counter=np.arange(200))
    assert ((sampled >= 0) & (sampled < 300)).all()
    if temperature < 1e-3:
        np.testing.assert_array_equal(sampled, logits.argmax(axis=1))
    if temperature == 1e30:
        assert len(set(sampled)) > 100


def test_a_draw_depends_on_seed_counter_and_row_alone(backend: _core.Backend) -> None:
    rng = np.random.default_rng(0)
    rows = 64
    logits = random_logits(rows, 777)
    options: dict[str, Any] = {
        "temperature": rng.uniform(0, 2, rows),
        "top_k": rng.integers(0, 50, rows),
        "top_p": rng.uniform(0.5, 1, rows),
        "min_p": rng.uniform(0, 0.1, rows),
        "seed": rng.integers(0, 2**64, rows, np.uint64),
        "counter": rng.integers(0, 1000, rows),
    }
    whole = sample(backend, logits, width=1, **options)
    for width in (2, 3):
        np.testing.assert_array_equal(sample(backend, logits, width=width, **options), whole)
    order = rng.permutation(rows)
    some = order[:20]
    part = sample(backend, logits[some], **{key: value[some] for key, value in options.items()})
    np.testing.assert_array_equal(part, whole[some])
    other = sample(backend, logits, **{**options, "seed": options["seed"] + np.uint64(1)})
    assert (other != whole).any()


def test_the_reference_generator_gives_known_answers() -> None:
    assert reference.philox4x32([0] * 4, [0] * 2) == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]
