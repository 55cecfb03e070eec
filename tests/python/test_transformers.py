"""Tiny random Llamas against `transformers`: logits of every position, greedy tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from engine_driver import Chunk, EngineDriver, load_engine
from nanoflow import _core
from tiny_models import write_tiny_llama

VARIANTS = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2},
    "mha": {"num_heads": 4, "num_kv_heads": 4},
    "mqa-tied": {"num_heads": 4, "num_kv_heads": 1, "tie_word_embeddings": True},
    "head-dim": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
    "llama3-rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}
SEQUENTIAL = _core.Schedule("sequential", [_core.LaneSpec("all", 2)])
NANO = _core.Schedule(
    "nano",
    [_core.LaneSpec("all", 2)],
    {stage: _core.StageSpec([0.5], "all") for stage in ("qkv", "attn", "o", "mlp")},
)
TOLERANCE = 2e-4  # largest difference of float32 logits, in standard deviations of them


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp(request.param), **VARIANTS[request.param])


def oracle(
    model: Path, tokens: list[int], weights: str = "float32", compute: str = "float32"
) -> NDArray[np.float32]:
    """Logits [T, V] of the reference with weights rounded to one dtype, computed in another."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, weights))
    reference = reference.to(getattr(torch, compute))
    with torch.no_grad():
        logits = reference(torch.tensor([tokens])).logits[0].float().numpy()
    return np.asarray(logits)


def random_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 100, length).tolist() for length in lengths]


def all_logits(model: Path, tokens: list[int], dtype: str) -> NDArray[np.float32]:
    driver = EngineDriver(load_engine(model, SEQUENTIAL, dtype=dtype))
    result = driver.step([[Chunk(driver.add(tokens), len(tokens), all_logits=True)]])
    assert result.logits is not None
    return result.logits


def test_float32_logits_of_every_position(model: Path) -> None:
    [tokens] = random_prompts((100,))
    expected = oracle(model, tokens)
    assert expected.std() > 0.3  # the model says something
    difference = np.abs(all_logits(model, tokens, "float32") - expected).max()
    assert difference < TOLERANCE * expected.std()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_no_more_than_transformers(model: Path, dtype: str) -> None:
    [tokens] = random_prompts((100,))
    exact = oracle(model, tokens, weights=dtype)

    def error(logits: NDArray[np.float32]) -> float:
        return float(np.sqrt(np.mean((logits - exact) ** 2)))

    theirs = error(oracle(model, tokens, weights=dtype, compute=dtype))
    assert error(all_logits(model, tokens, dtype)) < 1.2 * theirs


def test_odd_chunks_and_mixed_lengths_in_one_batch(model: Path) -> None:
    """Prefill chunks of 7 rows of one request beside decodes and whole prompts of others."""
    driver = EngineDriver(load_engine(model, NANO))
    long, short, middle = (driver.add(t) for t in random_prompts((61, 3, 20)))
    driver.step([[Chunk(short, 3)], [Chunk(long, 7)]])
    seen: list[NDArray[np.float32]] = []
    while long.computed < 61:
        rows = min(7, 61 - long.computed)
        first = [Chunk(long, rows, all_logits=True)]
        second = [Chunk(short, 1)]
        if middle.computed < 20:
            second.append(Chunk(middle, min(9, 20 - middle.computed)))
        result = driver.step([first, second] if len(seen) % 2 else [second, first])
        assert result.logits is not None
        seen.append(result.logits[:rows] if len(seen) % 2 else result.logits[-rows:])
    expected = oracle(model, long.tokens)
    got = np.concatenate(seen)
    assert np.abs(got - expected[7:]).max() < TOLERANCE * expected.std()
    # What the short request sampled along the way is greedy under the reference.
    check_greedy(short.tokens, 3, oracle(model, short.tokens))


def check_greedy(tokens: list[int], prompt: int, logits: NDArray[np.float32]) -> None:
    """Each generated token is the reference's, or within rounding of it at the first difference."""
    for position in range(prompt, len(tokens)):
        scores = logits[position - 1]
        best = int(scores.argmax())
        if tokens[position] != best:
            top5 = set(np.argsort(scores)[-5:].tolist())
            assert tokens[position] in top5
            assert scores[best] - scores[tokens[position]] < 1e-3
            return


def test_greedy_tokens(model: Path) -> None:
    driver = EngineDriver(load_engine(model, NANO))
    sequences = [driver.add(tokens) for tokens in random_prompts((1, 4, 5, 33))]
    lengths = [len(s.tokens) for s in sequences]
    halves = [sequences[:2], sequences[2:]]
    for _ in range(24):
        driver.step([[Chunk(s, len(s.tokens) - s.computed) for s in half] for half in halves])
    for sequence, prompt in zip(sequences, lengths, strict=True):
        assert len(sequence.tokens) == prompt + 24
        check_greedy(sequence.tokens, prompt, oracle(model, sequence.tokens))


def test_a_sharded_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    whole = write_tiny_llama(tmp_path / "whole")
    sharded = write_tiny_llama(tmp_path / "sharded", max_shard_size="20KB")
    assert (sharded / "model.safetensors.index.json").exists()
    results = []
    for model in (whole, sharded):
        driver = EngineDriver(load_engine(model, SEQUENTIAL))
        [tokens] = random_prompts((20,))
        results.append(driver.step([[Chunk(driver.add(tokens), 20)]]).logits)
    np.testing.assert_array_equal(results[0], results[1])
