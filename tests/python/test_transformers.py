"""Tiny random models against `transformers`: logits of every position, greedy tokens.

The CPU computes in float32; a GPU in bfloat16, beside transformers on that GPU if torch has it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from conftest import DEVICES
from engine_driver import Chunk, EngineDriver, load_engine
from mixtures import MIXTURES
from nanoflow import _core
from nanoflow.schedule import built_in_schedule
from tiny_models import write_tiny_llama

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2},
    "mha": {"num_heads": 4, "num_kv_heads": 4},
    "mqa-tied": {"num_heads": 4, "num_kv_heads": 1, "tie_word_embeddings": True},
    "head-dim": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
    "llama3-rope": {"rope_scaling": LLAMA3_ROPE},
    "llama2-d64": {
        "hidden_size": 256,
        "num_heads": 4,
        "num_kv_heads": 4,
        "initializer_range": 0.08,
    },
    "llama3-d128": {
        "hidden_size": 512,
        "num_heads": 4,
        "num_kv_heads": 1,
        "initializer_range": 0.06,
        "rope_scaling": LLAMA3_ROPE,
    },
    "yarn-rope": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
        },
    },
    "longrope": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)],
            "original_max_position_embeddings": 128,
        },
    },
    "mistral": {"family": "Mistral", "sliding_window": None},
    "mistral-window": {"family": "Mistral", "sliding_window": 17},
    "mistral-window-d64": {
        "family": "Mistral",
        "hidden_size": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "initializer_range": 0.08,
        "sliding_window": 20,
    },
    "deepseek-d128": {  # 67B: 64 query heads of 8 KV heads, a Llama with other sizes
        "hidden_size": 1024,
        "num_heads": 8,
        "num_kv_heads": 1,
        "num_layers": 3,
        "initializer_range": 0.04,
        "rms_norm_eps": 1e-6,
    },
    "llama3.2-d64": {
        "hidden_size": 256,
        "num_heads": 4,
        "num_kv_heads": 1,
        "initializer_range": 0.08,
        "tie_word_embeddings": True,
        "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0},
    },
    "qwen2-windows": {
        "family": "Qwen2",
        "num_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "qwen2-d64": {
        "family": "Qwen2",
        "hidden_size": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "initializer_range": 0.08,
    },
    "gemma3": {
        "family": "Gemma3",
        "num_layers": 3,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 13,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "initializer_range": 0.12,
    },
    "gemma3-d256": {
        "family": "Gemma3",
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 256,
        "sliding_window_pattern": 2,
        "sliding_window": 40,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "initializer_range": 0.12,
    },
    "qwen3": {"family": "Qwen3", "head_dim": 32},
    "qwen3-d128": {
        "family": "Qwen3",
        "hidden_size": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 128,
        "initializer_range": 0.08,
    },
    **MIXTURES,
}
ON_GPU = {  # of head_dim 64, 128 and 256
    "head-dim",
    "llama2-d64",
    "llama3-d128",
    "llama3.2-d64",
    "mistral-window-d64",
    "deepseek-d128",
    "qwen2-d64",
    "qwen3-d128",
    "gemma3-d256",
    "mixtral-d128",
    "qwen3-moe-d64",
}
TOLERANCE = 2e-4  # largest difference of float32 logits, in standard deviations of them
TORCH = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Subject:
    """What is compared with transformers."""

    model: Path
    device: str

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"

    def engine(self, schedule: str, dtype: str | None = None) -> _core.Engine:
        width = _core.Backend(self.device, threads=2 if self.device == "cpu" else 0).width
        return load_engine(
            self.model,
            built_in_schedule(schedule, width),
            dtype=dtype or self.dtype,
            device=self.device,
            threads=2,
        )

    @property
    def has_experts(self) -> bool:
        """In half precision a row may go to another expert than in float32 where two are all but
        equal, and then says something else: not every row of such a model can be compared."""
        return "num_experts_per_tok" in json.loads((self.model / "config.json").read_text())

    def worst(self, difference: NDArray[np.float32]) -> float:
        """The largest difference of logits [T, V], in three of four rows if they are rerouted."""
        share = 0.75 if self.has_experts and self.dtype != "float32" else 1.0
        return float(np.quantile(np.abs(difference).max(axis=1), share))

    def limit(self, tokens: list[int], exact: NDArray[np.float32]) -> float:
        """How far a logit may be from the exact one: in bfloat16, about as far as theirs are."""
        if self.dtype == "float32":
            return TOLERANCE * float(exact.std())
        theirs = oracle(self.model, tokens, weights=self.dtype, compute=self.dtype)
        return 1.5 * self.worst(theirs - exact)


@pytest.fixture(
    scope="module",
    params=[(v, d) for v in VARIANTS for d in DEVICES if d == "cpu" or v in ON_GPU],
    ids="-".join,
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    variant, device = request.param
    model = write_tiny_llama(tmp_path_factory.mktemp(variant), **VARIANTS[variant])
    return Subject(model, device)


def oracle(
    model: Path, tokens: list[int], weights: str = "float32", compute: str = "float32"
) -> NDArray[np.float32]:
    """Logits [T, V] of the reference with weights rounded to one dtype, computed in another."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, weights))
    reference = reference.to(TORCH, getattr(torch, compute))
    with torch.no_grad():
        logits = reference(torch.tensor([tokens], device=TORCH)).logits[0]
    return np.asarray(logits.float().cpu().numpy())


def random_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 100, length).tolist() for length in lengths]


def all_logits(engine: _core.Engine, tokens: list[int]) -> NDArray[np.float32]:
    driver = EngineDriver(engine)
    result = driver.step([[Chunk(driver.add(tokens), len(tokens), all_logits=True)]])
    assert result.logits is not None
    return result.logits


def test_float32_logits_of_every_position(subject: Subject) -> None:
    if subject.device != "cpu":
        pytest.skip("a GPU has no float32 model")
    [tokens] = random_prompts((100,))
    expected = oracle(subject.model, tokens)
    assert expected.std() > 0.3  # the model says something
    difference = np.abs(all_logits(subject.engine("sequential"), tokens) - expected).max()
    assert difference < TOLERANCE * expected.std()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_no_more_than_transformers(subject: Subject, dtype: str) -> None:
    [tokens] = random_prompts((100,))
    exact = oracle(subject.model, tokens, weights=dtype)

    def error(logits: NDArray[np.float32]) -> float:
        squares = np.mean((logits - exact) ** 2, axis=1)
        return float(np.sqrt(np.median(squares) if subject.has_experts else squares.mean()))

    theirs = error(oracle(subject.model, tokens, weights=dtype, compute=dtype))
    ours = error(all_logits(subject.engine("sequential", dtype), tokens))
    assert ours < (1.5 if subject.has_experts else 1.2) * theirs


def test_odd_chunks_and_mixed_lengths_in_one_batch(subject: Subject) -> None:
    """Prefill chunks of 7 rows of one request beside decodes and whole prompts of others."""
    driver = EngineDriver(subject.engine("nano"))
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
    expected = oracle(subject.model, long.tokens, weights=subject.dtype)
    got = np.concatenate(seen)
    assert subject.worst(got - expected[7:]) < subject.limit(long.tokens, expected)
    # What the short request sampled along the way is greedy under the reference.
    check_greedy(subject, short.tokens, 3)


def check_greedy(subject: Subject, tokens: list[int], prompt: int) -> None:
    """Each generated token is the reference's, or within rounding of it at the first difference."""
    logits = oracle(subject.model, tokens, weights=subject.dtype)
    for position in range(prompt, len(tokens)):
        scores = logits[position - 1]
        best = int(scores.argmax())
        if tokens[position] != best:
            top5 = set(np.argsort(scores)[-5:].tolist())
            assert tokens[position] in top5
            gap = float(scores[best] - scores[tokens[position]])
            is_rerouted = subject.has_experts and subject.dtype != "float32"
            limit = scores.std() if is_rerouted else 2 * subject.limit(tokens, logits)
            assert gap < max(1e-3, limit)
            return


def test_greedy_tokens(subject: Subject) -> None:
    driver = EngineDriver(subject.engine("nano"))
    sequences = [driver.add(tokens) for tokens in random_prompts((1, 4, 5, 33))]
    lengths = [len(s.tokens) for s in sequences]
    halves = [sequences[:2], sequences[2:]]
    for _ in range(24):
        driver.step([[Chunk(s, len(s.tokens) - s.computed) for s in half] for half in halves])
    for sequence, prompt in zip(sequences, lengths, strict=True):
        assert len(sequence.tokens) == prompt + 24
        check_greedy(subject, sequence.tokens, prompt)


@pytest.mark.parametrize(
    "variant",
    ["gqa", "mistral", "qwen2-d64", "qwen3", "gemma3", "mixtral", "qwen3-moe-raw"],
)
def test_a_sharded_checkpoint_gives_the_same_logits(tmp_path: Path, variant: str) -> None:
    config = VARIANTS[variant]
    whole = write_tiny_llama(tmp_path / "whole", **config)
    sharded = write_tiny_llama(tmp_path / "sharded", max_shard_size="20KB", **config)
    assert (sharded / "model.safetensors.index.json").exists()
    results = []
    for model in (whole, sharded):
        driver = EngineDriver(Subject(model, "cpu").engine("sequential"))
        [tokens] = random_prompts((20,))
        results.append(driver.step([[Chunk(driver.add(tokens), 20)]]).logits)
    np.testing.assert_array_equal(results[0], results[1])
