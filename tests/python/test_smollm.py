"""Real weights: SmolLM2-135M-Instruct against `transformers` on the same dequantised weights, and
every device in bfloat16 against the CPU in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from conftest import DEVICES, SMALL_CACHE
from engine_driver import Chunk, EngineDriver, load_engine
from nanoflow import LLM, SamplingParams, StructuredOutputsParams, _core
from nanoflow.bench.default_model import default_model
from nanoflow.schedule import built_in_schedule

NEW_TOKENS = 64
# Below the best logit, of a candidate at the first difference; now and then three of them are as
# close. bfloat16 moves a logit by 0.1.
MAX_GAP = {"float32": 1e-2, "bfloat16": 0.3}
HALF: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 256,
    "kv_cache_memory_bytes": SMALL_CACHE,
}
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


Greedy = tuple[list[list[int]], list[NDArray[np.float32]]]


def greedy_with_logits(model: Path, prompts: list[list[int]], device: str, dtype: str) -> Greedy:
    """Tokens and logits [NEW_TOKENS, V] of the engine, all prompts in one batch."""
    width = _core.Backend(device, threads=2 if device == "cpu" else 0).width
    schedule = built_in_schedule("sequential", width)
    driver = EngineDriver(
        load_engine(model, schedule, device=device, dtype=dtype, threads=2, max_seqs=32)
    )
    sequences = [driver.add(tokens) for tokens in prompts]
    rows: list[list[NDArray[np.float32]]] = [[] for _ in prompts]
    for _ in range(NEW_TOKENS):
        result = driver.step([[Chunk(s, len(s.tokens) - s.computed) for s in sequences]])
        assert result.logits is not None
        for mine, row in zip(rows, result.logits, strict=True):
            mine.append(row)
    return [s.tokens for s in sequences], [np.stack(mine) for mine in rows]


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    return [llm.get_tokenizer().encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def on_cpu(model: Path, prompts: list[list[int]]) -> Greedy:
    return greedy_with_logits(model, prompts, "cpu", "float32")


def equal_answers(
    prompts: list[list[int]], ours: Greedy, theirs: list[NDArray[np.float32]], dtype: str
) -> int:
    """How many answers are greedy by the other side's logits [NEW_TOKENS, V] of the same tokens.

    Asserts of all others that each side has both candidates close to the top where they first
    differ.
    """

    def is_close(logits: NDArray[np.float32], token: int) -> bool:
        return float(logits.max() - logits[token]) < MAX_GAP[dtype]

    equal = 0
    for prompt, tokens, mine, expected in zip(prompts, *ours, theirs, strict=True):
        answer, greedy = np.array(tokens[len(prompt) :]), expected.argmax(axis=1)
        if (answer == greedy).all():
            equal += 1
            continue
        step = int((answer != greedy).argmax())
        assert is_close(expected[step], int(answer[step]))
        assert is_close(mine[step], int(greedy[step]))
    return equal


def test_greedy_tokens_are_those_of_transformers(
    model: Path, prompts: list[list[int]], on_cpu: Greedy
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    )
    theirs = []
    for sequence in on_cpu[0]:
        with torch.no_grad():
            logits = reference(torch.tensor([sequence])).logits[0].numpy()
        theirs.append(logits[-NEW_TOKENS - 1 : -1])
    # Differences at rounding are rare, not the rule.
    assert equal_answers(prompts, on_cpu, theirs, "float32") >= len(PROMPTS) // 2


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_answers_are_those_of_float32(
    model: Path, prompts: list[list[int]], on_cpu: Greedy, device: str
) -> None:
    """Up to the first difference the two have the same tokens behind them."""
    answers = greedy_with_logits(model, prompts, device, "bfloat16")
    assert equal_answers(prompts, answers, on_cpu[1], "bfloat16") >= len(PROMPTS) // 4


def test_llm_generates_the_engines_tokens(
    llm: LLM, prompts: list[list[int]], on_cpu: Greedy
) -> None:
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts[:6]], params, use_tqdm=False
    )
    for prompt, sequence, output in zip(prompts, on_cpu[0], outputs, strict=False):
        assert output.outputs[0].token_ids == sequence[len(prompt) :]


@pytest.mark.parametrize("device", DEVICES)
def test_chat_knows_the_capital_of_france(model: Path, device: str) -> None:
    with LLM(str(model), device=device, **HALF) as llm:
        [output] = llm.chat(
            [{"role": "user", "content": "What is the capital of France?"}],
            SamplingParams(temperature=0, max_tokens=32),
            use_tqdm=False,
        )
    assert output.outputs[0].text == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("device", DEVICES)
def test_limits_of_requests_hold_beside_each_other(model: Path, llm: LLM, device: str) -> None:
    """A schema, a choice, allowed tokens, a bias and bad words, and the likelihood of a prompt."""
    schema = StructuredOutputsParams(json=PERSON)
    choice = StructuredOutputsParams(choice=["Paris", "London"])
    params = [
        SamplingParams(temperature=0, max_tokens=120, structured_outputs=schema),
        SamplingParams(temperature=0, max_tokens=20, structured_outputs=choice),
        SamplingParams(seed=1, max_tokens=20, allowed_token_ids=[500, 600, 40_000]),
        SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logit_bias={1234: 100.0}),
        SamplingParams(temperature=0, max_tokens=16, bad_words=["Paris"]),
        SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=1),
    ]
    prompts = ["Describe a person as JSON.", *["What is the capital of France?"] * 5]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    with LLM(str(model), device=device, **HALF) as own:
        outputs = own.chat(chats, params, use_tqdm=False)
    person = json.loads(outputs[0].outputs[0].text)
    assert list(person) == ["name", "age", "likes"] and type(person["age"]) is int
    assert outputs[0].outputs[0].finish_reason == "stop" and len(person["likes"]) <= 3
    assert outputs[1].outputs[0].text in ("Paris", "London")
    assert set(outputs[2].outputs[0].token_ids) <= {500, 600, 40_000}
    assert outputs[3].outputs[0].token_ids == [1234] * 5
    assert "Paris" not in outputs[4].outputs[0].text and "Paris" in outputs[5].outputs[0].text
    ids = outputs[5].prompt_token_ids
    [exact] = llm.generate([ids], params[5], use_tqdm=False)
    found, expected = outputs[5].prompt_logprobs or [], exact.prompt_logprobs or []
    for token, entries, others in zip(ids[1:], found[1:], expected[1:], strict=True):
        assert entries is not None and others is not None
        assert entries[token].logprob == pytest.approx(others[token].logprob, abs=0.3, rel=0.05)
