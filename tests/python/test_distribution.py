"""How often each token is drawn, on every path of the sampler: chi-square tests with fixed seeds.

The ops run one after the other as the head of a step has them; a whole LLM then draws the first
token of thousands of samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import reference
from nanoflow import LLM, SamplingParams, _core
from test_constraints import pack
from test_sampling import random_logits, sample
from tiny_models import write_tiny_llama

DRAWS = 20_000
VOCABULARY = 130
HISTORY = [3, 17, 17, 40, 3, 99, 17, 64]  # of which the last five have been generated
GENERATED = 5

PENALTIES = {"presence": 0.7, "frequency": 0.4, "repetition": 1.3}
BIAS = {0: 3.0, 17: 4.0, 63: -2.0, 129: 2.5}
ALLOWED = [0, 1, 3, 17, 31, 32, 63, 64, 99, 100, 128, 129]
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"temperature": 0.8, "top_k": 30},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
]
LIMITS: list[dict[str, Any]] = [
    {"penalties": PENALTIES},
    {"bias": BIAS},
    {"allowed": ALLOWED},
    {"bias": BIAS, "penalties": PENALTIES, "allowed": ALLOWED},
]
PATHS = [
    *({"filters": filters} for filters in FILTERS),
    *({"filters": filters, **limits} for limits in LIMITS for filters in (FILTERS[0], FILTERS[-1])),
]


def check_frequencies(counts: NDArray[np.int64], p: NDArray[np.float64]) -> None:
    """Nothing that has no probability, and a statistic that is exceeded once in 30,000 times."""
    assert counts[p == 0].sum() == 0
    expected = counts.sum() * p[p > 0]
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum()
    freedom = (p > 0).sum() - 1
    assert statistic <= freedom + 4 * np.sqrt(2 * freedom)


def change(
    logits: NDArray[np.float32],
    *,
    bias: dict[int, float] | None = None,
    penalties: dict[str, float] | None = None,
    allowed: list[int] | None = None,
    generated: int = GENERATED,
) -> NDArray[np.float64]:
    """One row of logits as it is sampled behind HISTORY."""
    x = logits.astype(np.float64)
    x[list(bias or {})] += list((bias or {}).values())
    if penalties is not None:
        x = reference.penalize(x, HISTORY, generated, **penalties)
    if allowed is not None:
        x[np.setdiff1d(np.arange(len(x)), allowed)] = -np.inf
    return x


def run_changes(
    backend: _core.Backend,
    logits: NDArray[np.float32],
    *,
    bias: dict[int, float] | None = None,
    penalties: dict[str, float] | None = None,
    allowed: list[int] | None = None,
) -> None:
    """The same of all rows, by the ops."""
    rows = len(logits)
    if bias is not None:
        _core.run_op(
            "add_bias",
            backend,
            logits=logits,
            indptr=(np.arange(rows + 1) * len(bias)).astype(np.int32),
            tokens=np.tile(np.array(list(bias), np.int32), rows),
            values=np.tile(np.array(list(bias.values()), np.float32), rows),
        )
    if penalties is not None:
        _core.run_op(
            "penalize",
            backend,
            logits=logits,
            history=np.array([HISTORY], np.int32),
            slots=np.zeros(rows, np.int32),
            length=np.full(rows, len(HISTORY), np.int32),
            generated=np.full(rows, GENERATED, np.int32),
            **{name: np.full(rows, value, np.float32) for name, value in penalties.items()},
        )
    if allowed is not None:
        mask = np.isin(np.arange(logits.shape[1]), allowed)[None]
        _core.run_op(
            "mask_logits",
            backend,
            logits=logits,
            mask_rows=np.zeros(rows, np.int32),
            masks=pack(mask),
        )


@pytest.mark.parametrize("path", PATHS)
def test_ops_draw_as_they_should(backend: _core.Backend, path: dict[str, Any]) -> None:
    limits = {name: value for name, value in path.items() if name != "filters"}
    filters = {"temperature": 1.0, **path["filters"]}
    [logits] = random_logits(1, VOCABULARY, seed=1) / 2
    rows = np.tile(logits, (DRAWS, 1))
    run_changes(backend, rows, **limits)
    sampled = sample(backend, rows, seed=99, counter=np.arange(DRAWS), **filters)
    changed = change(logits, **limits).astype(np.float32)
    p = reference.allowed_probabilities(changed, **filters)
    check_frequencies(np.bincount(sampled, minlength=VOCABULARY), p)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = write_tiny_llama(tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)
    with LLM(
        model, skip_tokenizer_init=True, max_model_len=64, dtype="float32", device="cpu"
    ) as llm:
        yield llm


@pytest.mark.parametrize("path", PATHS[::2])
def test_an_llm_draws_as_it_should(llm: LLM, path: dict[str, Any]) -> None:
    """The first token behind a prompt, of many samples: penalties know the prompt alone."""
    filters = path["filters"]
    limits = {name: value for name, value in path.items() if name != "filters"}
    penalties = limits.get("penalties", {})
    params = SamplingParams(
        n=3000,
        seed=11,
        max_tokens=1,
        logit_bias=limits.get("bias"),
        allowed_token_ids=limits.get("allowed"),
        **{f"{name}_penalty": value for name, value in penalties.items()},
        **filters,
    )
    [output] = llm.generate([HISTORY], params, use_tqdm=False)
    oracle = AutoModelForCausalLM.from_pretrained(Path(str(llm.args.model)), dtype=torch.float32)
    with torch.no_grad():
        logits = oracle(torch.tensor([HISTORY])).logits[0, -1].numpy()
    changed = change(logits, generated=0, **limits).astype(np.float32)
    p = reference.allowed_probabilities(changed, **{"temperature": 1.0, **filters})
    tokens = [sample.token_ids[0] for sample in output.outputs]
    check_frequencies(np.bincount(tokens, minlength=VOCABULARY), p)
