"""Real weights: SmolLM2-135M-Instruct against `transformers` on the same dequantised weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from engine_driver import Chunk, EngineDriver, load_engine
from nanoflow import LLM, SamplingParams, _core
from nanoflow.bench.default_model import default_model

NEW_TOKENS = 64
MAX_GAP = 1e-2  # between logits of the two candidates at the first difference
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three primary colours are",
    "Q: What is 17 + 25?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, humans first",
    "The recipe needs two eggs,",
    "import numpy as np\n\nx = np.",
    "Photosynthesis is the process by which",
    "She opened the door and saw",
    "The difference between a list and a tuple in Python is",
    "1, 1, 2, 3, 5, 8, 13,",
    "Le chat est",
    "The mitochondria is",
    "To be, or not to be,",
    "A good morning routine starts with",
    "The stock market fell today because",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture(scope="module")
def model() -> Path:
    return default_model()


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(model=str(model), dtype="float32", schedule="overlap", max_model_len=256)


def greedy_with_logits(
    model: Path, prompts: list[list[int]]
) -> tuple[list[list[int]], list[NDArray[np.float32]]]:
    """Tokens and logits [NEW_TOKENS, V] of the engine, all prompts in one batch."""
    schedule = _core.Schedule("sequential", [_core.LaneSpec("all", 2)])
    driver = EngineDriver(load_engine(model, schedule, threads=2, max_seqs=32))
    sequences = [driver.add(tokens) for tokens in prompts]
    rows: list[list[NDArray[np.float32]]] = [[] for _ in prompts]
    for _ in range(NEW_TOKENS):
        result = driver.step([[Chunk(s, len(s.tokens) - s.computed) for s in sequences]])
        assert result.logits is not None
        for mine, row in zip(rows, result.logits, strict=True):
            mine.append(row)
    return [s.tokens for s in sequences], [np.stack(mine) for mine in rows]


def in_top2_within_gap(logits: NDArray[np.float32], token: int) -> bool:
    best, second = np.argsort(logits)[-1:-3:-1]
    return token in (best, second) and float(logits[best] - logits[token]) < MAX_GAP


def test_greedy_tokens_are_those_of_transformers(llm: LLM, model: Path) -> None:
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    tokens, logits = greedy_with_logits(model, prompts)
    reference = AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    )
    equal = 0
    for prompt, sequence, ours in zip(prompts, tokens, logits, strict=True):
        with torch.no_grad():
            theirs = reference(torch.tensor([sequence])).logits[0].numpy()
        for step in range(NEW_TOKENS):
            expected = theirs[len(prompt) + step - 1]
            token, best = sequence[len(prompt) + step], int(expected.argmax())
            if token != best:
                assert in_top2_within_gap(expected, token)
                assert in_top2_within_gap(ours[step], best)
                break
        else:
            equal += 1
    assert equal >= len(PROMPTS) // 2  # differences at rounding are rare, not the rule


def test_llm_generates_the_engines_tokens(llm: LLM, model: Path) -> None:
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[:6]]
    tokens, _ = greedy_with_logits(model, prompts)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    for prompt, sequence, output in zip(prompts, tokens, outputs, strict=True):
        assert output.outputs[0].token_ids == sequence[len(prompt) :]


def test_chat_knows_the_capital_of_france(llm: LLM) -> None:
    [output] = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}],
        SamplingParams(temperature=0, max_tokens=32),
        use_tqdm=False,
    )
    assert output.outputs[0].text == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"
