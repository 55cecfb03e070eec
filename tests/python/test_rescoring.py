"""What decoding computed, computed again by prefilling: corrupted keys and values cannot hide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import DEVICES
from engine_driver import Chunk, EngineDriver, Sequence, load_engine
from nanoflow import _core
from nanoflow.schedule import built_in_schedule
from random_models import SHAPES, write_config

PROMPTS = (1, 3, 17, 40, 5, 64, 33, 2)  # tokens of each
NEW_TOKENS = 126  # 1,000 in all
CHUNK_ROWS = 48
# Of the KL divergence, in nats. Both ways round to bfloat16 after sums in another order: that moves
# a logit by about 0.02, and KL is half the variance of it. On the CPU the order is the same.
MEAN_KL, MAX_KL = 1e-3, 1e-2
SWAPPED = (2, 6)  # sequences

Logits = NDArray[np.float32]


@pytest.fixture(scope="module", params=["llama3-d64", "llama3-d128"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp(request.param), **SHAPES[request.param])


@pytest.fixture(scope="module", params=DEVICES)
def engine(request: pytest.FixtureRequest, model: Path) -> _core.Engine:
    device: str = request.param
    width = _core.Backend(device, threads=2 if device == "cpu" else 0).width
    return load_engine(
        model,
        built_in_schedule("overlap", width),
        dtype="bfloat16",
        device=device,
        threads=2,
        max_model_len=256,
        random_weights=True,
    )


def decode(driver: EngineDriver, swap_at: int | None = None) -> tuple[list[Sequence], Logits]:
    """Sequences of PROMPTS[i] + NEW_TOKENS + 1 tokens drawn one by one, and logits
    [sequence, NEW_TOKENS, V] that they were drawn from but for each first one.

    `swap_at`: the step after which pages of two sequences change places. (Pages of one sequence
    may: positions are in the keys.)
    """
    rng = np.random.default_rng(1)
    sequences = [driver.add(rng.integers(0, 160, n).tolist(), temperature=1.0) for n in PROMPTS]
    half = len(sequences) // 2
    logits: list[Logits] = []
    for step in range(NEW_TOKENS + 1):
        segments = [sequences[:half], sequences[half:]]
        result = driver.step(
            [[Chunk(s, len(s.tokens) - s.computed) for s in segment] for segment in segments]
        )
        assert result.logits is not None
        logits.append(result.logits)
        if step == swap_at:
            first, second = (sequences[i].pages for i in SWAPPED)
            first[2], second[5] = second[5], first[2]
    return sequences, np.stack(logits[1:], axis=1)


def prefill(driver: EngineDriver, sequences: list[Sequence]) -> Logits:
    """Logits of the same positions, [sequence, NEW_TOKENS, V], of chunks of whole sequences."""
    rescored = []
    for sequence in sequences:
        again = driver.add(sequence.tokens)
        parts: list[Logits] = []
        while again.computed < len(again.tokens):
            rows = min(CHUNK_ROWS, len(again.tokens) - again.computed)
            chunk = Chunk(again, rows, all_logits=True)
            # The other segment stays empty in turn.
            result = driver.step([[chunk], []] if len(parts) % 2 else [[], [chunk]])
            assert result.logits is not None
            parts.append(result.logits)
        rescored.append(np.concatenate(parts)[-NEW_TOKENS - 1 : -1])
        driver.release(again)
    return np.stack(rescored)


def kl(p: Logits, q: Logits) -> NDArray[np.float64]:
    """KL(p ‖ q) of the softmax over the last axis, in nats."""

    def log_softmax(logits: Logits) -> NDArray[np.float64]:
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        normed: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return normed

    log_p, log_q = log_softmax(p), log_softmax(q)
    divergence: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return divergence


def test_decoding_and_prefilling_say_the_same(engine: _core.Engine) -> None:
    driver = EngineDriver(engine)
    sequences, decoded = decode(driver)
    assert decoded.shape[0] * decoded.shape[1] >= 1000
    assert len({tuple(s.tokens[-NEW_TOKENS:]) for s in sequences}) == len(sequences)
    rescored = prefill(driver, sequences)
    assert rescored.std() > 0.5
    divergence = kl(rescored, decoded)
    assert divergence.mean() < MEAN_KL and divergence.max() < MAX_KL


def test_on_a_cpu_they_say_it_bit_for_bit(model: Path) -> None:
    schedule = built_in_schedule("overlap", 2)
    driver = EngineDriver(
        load_engine(model, schedule, dtype="bfloat16", max_model_len=256, random_weights=True)
    )
    sequences, decoded = decode(driver)
    np.testing.assert_array_equal(prefill(driver, sequences), decoded)


def test_two_pages_that_change_places_are_noticed(engine: _core.Engine) -> None:
    """The check fails where it should: in their two sequences, from the next token on."""
    driver = EngineDriver(engine)
    swapped_at = NEW_TOKENS // 4
    sequences, decoded = decode(driver, swapped_at)
    divergence = kl(prefill(driver, sequences), decoded)
    assert divergence.mean() > 10 * MEAN_KL
    for sequence in SWAPPED:
        spoilt = divergence[sequence, swapped_at:]
        assert spoilt.mean() > 50 * MEAN_KL and (spoilt > MAX_KL).mean() > 0.5
        divergence[sequence, swapped_at:] = 0
    assert divergence.mean() < MEAN_KL and divergence.max() < MAX_KL
