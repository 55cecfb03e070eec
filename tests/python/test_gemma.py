"""Real weights of Gemma 3: tokens, logits and answers of the 270M model against `transformers` on
the same dequantised weights, a CPU in float32 and a GPU in bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from conftest import DEVICES, SMALL_CACHE
from engine_driver import Chunk, EngineDriver, load_engine
from gemma_model import gemma_model
from nanoflow import LLM, SamplingParams, _core
from nanoflow.schedule import built_in_schedule

NEW_TOKENS = 16
# What google's tokenizer makes of them: BOS, and no space in front.
PROMPTS = {
    "The capital of France is": [2, 818, 5279, 529, 7001, 563],
    "Once upon a time,": [2, 14946, 3324, 496, 990, 236764],
}
LONG = 700  # tokens: more than the window of 512
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
# Below the best logit, of an answer's tokens. transformers' own bfloat16 moves a logit by 0.5.
MAX_GAP = {"cpu": 1e-2, "cuda": 0.5}
# Of a logit, in their standard deviations: of bfloat16, half as much again as transformers'.
TOLERANCE = {"cpu": 2e-3, "cuda": 0.1}


@pytest.fixture(scope="module")
def model() -> Path:
    return gemma_model()


@pytest.fixture(scope="module")
def reference(model: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    )


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def driver(model: Path, device: str) -> EngineDriver:
    width = _core.Backend(device, threads=2 if device == "cpu" else 0).width
    engine = load_engine(
        model,
        built_in_schedule("nano", width),
        dtype=DTYPES[device],
        device=device,
        threads=2,
        max_seqs=8,
        max_rows=512,
        max_model_len=1024,
        page_size=16,
    )
    return EngineDriver(engine)


def logits_of(reference: AutoModelForCausalLM, tokens: list[int]) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(reference(torch.tensor([tokens])).logits[0].numpy())


def test_greedy_answers_are_those_of_transformers(
    driver: EngineDriver, reference: AutoModelForCausalLM, device: str
) -> None:
    sequences = [driver.add(tokens) for tokens in PROMPTS.values()]
    for _ in range(NEW_TOKENS):
        driver.step([[Chunk(s, len(s.tokens) - s.computed)] for s in sequences])
    for sequence, prompt in zip(sequences, PROMPTS.values(), strict=True):
        expected = logits_of(reference, sequence.tokens)
        answer = sequence.tokens[len(prompt) :]
        rows = expected[len(prompt) - 1 : -1]
        chosen = rows[np.arange(NEW_TOKENS), answer]
        assert len(answer) == NEW_TOKENS
        # Equal, or as likely within rounding.
        np.testing.assert_allclose(chosen, rows.max(axis=1), rtol=0, atol=MAX_GAP[device])


def test_rows_beyond_the_window_have_the_logits_of_transformers(
    driver: EngineDriver, reference: AutoModelForCausalLM, device: str
) -> None:
    tokens = [2, *np.random.default_rng(3).integers(1000, 200_000, LONG - 1).tolist()]
    sequence = driver.add(tokens)
    got = []
    for rows in (400, LONG - 404, 4):
        result = driver.step([[Chunk(sequence, rows, all_logits=rows == 4)], []])
        got.append(result.logits)
    expected = logits_of(reference, tokens)[-4:]
    assert got[-1] is not None and expected.std() > 1
    atol = TOLERANCE[device] * float(expected.std())
    np.testing.assert_allclose(got[-1], expected, rtol=0, atol=atol)


def test_llm_speaks_its_language(model: Path, device: str) -> None:
    sizes = {"max_model_len": 64, "kv_cache_memory_bytes": SMALL_CACHE}
    with LLM(str(model), dtype="bfloat16", device=device, **sizes) as llm:
        tokenizer = llm.get_tokenizer()
        assert {prompt: tokenizer.encode(prompt) for prompt in PROMPTS} == PROMPTS
        text = "Voilà:  naïve\tcafé,\n\n東京都 안녕 🙂 x=1e-3;"
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
        params = SamplingParams(temperature=0, max_tokens=12)
        [output] = llm.generate("Paris is the capital of", params, use_tqdm=False)
    assert output.outputs[0].text.startswith(" France")
