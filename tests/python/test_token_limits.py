"""logit_bias, allowed_token_ids and bad_words of whole generations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import reference
from conftest import DEVICES, SMALL_CACHE
from nanoflow import LLM, RequestOutput, SamplingParams
from nanoflow.token_bits import bits_of, leaves_nothing
from nanoflow.token_masks import BadWords
from random_models import SHAPES, write_config
from test_policy import Setup, check_output, request

SIZES: dict[str, Any] = {"max_model_len": 64, "block_size": 8, "dtype": "float32", "device": "cpu"}
PROMPTS = [[5, 6, 7], [40, 41, 42, 43], [9], [100, 8]]


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **SIZES) as llm:
        yield llm


def generate(llm: LLM, prompts: Any, params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True} | changes)


def test_biases_change_generations_as_they_should(model: Path, llm: LLM) -> None:
    """transformers' logits with biases, then penalties; logprobs are told of the plain logits."""
    rng = np.random.default_rng(0)
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    biases = [
        dict(zip(rng.permutation(150)[:60].tolist(), rng.uniform(-3, 3, 60).tolist(), strict=True))
        for _ in PROMPTS
    ]
    params = [greedy(logit_bias=b, repetition_penalty=1.3, logprobs=1) for b in biases]
    for prompt, bias, output in zip(PROMPTS, biases, generate(llm, PROMPTS, params), strict=True):
        tokens, [completion] = list(prompt), output.outputs
        for generated, logprobs in enumerate(completion.logprobs or ()):
            with torch.no_grad():
                plain: NDArray[np.float32] = oracle(torch.tensor([tokens])).logits[0, -1].numpy()
            logits = plain.copy()
            logits[list(bias)] += np.array(list(bias.values()), np.float32)
            tokens.append(
                int(reference.penalize(logits, tokens, generated, repetition=1.3).argmax())
            )
            expected = reference.log_softmax(plain)[tokens[-1]]
            assert logprobs[tokens[-1]].logprob == pytest.approx(expected, abs=2e-4)
        assert completion.token_ids == tokens[len(prompt) :]
    plain_ids = [o.outputs[0].token_ids for o in generate(llm, PROMPTS, greedy())]
    biased_ids = [o.outputs[0].token_ids for o in generate(llm, PROMPTS, params)]
    assert all(a != b for a, b in zip(plain_ids, biased_ids, strict=True))


def test_a_large_bias_is_clamped_and_decides(llm: LLM) -> None:
    for value in (100.0, 1e9):
        [output] = generate(llm, [[5, 6]], greedy(logit_bias={17: value}, max_tokens=5))
        assert output.outputs[0].token_ids == [17] * 5
    bias = SamplingParams(logit_bias={3: 1e9, 4: -1e9}).resolve([], 9, 0).bias
    assert bias is not None and bias.values.tolist() == [100.0, -100.0]


def test_only_allowed_tokens_are_sampled(llm: LLM) -> None:
    allowed = [3, 9, 31, 32, 64, 127]
    params = SamplingParams(
        temperature=3.0, seed=1, max_tokens=40, ignore_eos=True, allowed_token_ids=allowed
    )
    outputs = generate(llm, PROMPTS, params)
    assert {t for output in outputs for t in output.outputs[0].token_ids} == set(allowed)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_bad_words_are_never_generated(llm: LLM, temperature: float) -> None:
    """Of one token and of several; what is banned is what the model would have said."""
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=40, ignore_eos=True)
    [plain] = generate(llm, ["the lazy"], params)
    tokenizer = llm.get_tokenizer()
    said = plain.outputs[0].token_ids
    words = []
    for length in (1, 2):
        parts = [said[i : i + length] for i in range(0, 40, 5)]
        texts = [tokenizer.decode(part).lstrip() for part in parts]
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        same = [text for text, ids, part in zip(texts, encoded, parts, strict=True) if ids == part]
        assert same
        words += same
    params.bad_words = words
    [output] = generate(llm, ["the lazy"], params)
    ids = output.outputs[0].token_ids
    assert len(ids) == 40 and ids != plain.outputs[0].token_ids
    for word in words:
        banned = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        found = [ids[i : i + len(banned)] == banned for i in range(len(ids))]
        assert not any(found), word


def test_the_last_token_is_banned_behind_those_before_it() -> None:
    words = BadWords([(1, 2), (1, 3), (5, 1, 4)], 40)
    every = bits_of(range(40), 40)
    banned = []
    for token in (5, 1, 1, 2, 1):
        words.push(token)
        banned.append([t for t in range(40) if not words.bits[t // 32] >> t % 32 & 1])
    assert banned == [[], [2, 3, 4], [2, 3], [], [2, 3]]
    assert leaves_nothing(every, np.arange(40, dtype=np.int32))
    assert not leaves_nothing(every, np.arange(1, 40, dtype=np.int32))


def test_a_request_whose_mask_waits_takes_part_every_other_step() -> None:
    """Others take part in every one, and both generate what they would alone."""
    setup = Setup(num_slots=3)
    items = [request(n, 3, 20, ignore_eos=True) for n in range(3)]
    items[1].token_mask = BadWords([(t, u) for t in range(30) for u in range(15)], 30)
    setup.add(*items)
    steps = [setup.turn().slots.tolist() for _ in range(8)]
    assert steps[0] == [0, 1, 2]
    assert [1 in step for step in steps] == [True, False] * 4
    assert all({0, 2} <= set(step) for step in steps)
    setup.finish()
    check_output(items[0])
    check_output(items[2])
    assert len(items[1].output_token_ids) == 17 and min(items[1].output_token_ids[1:]) >= 15
    setup = Setup(num_slots=3, steps_in_flight=1)
    items = [request(n, 3, 20, ignore_eos=True) for n in range(3)]
    items[1].token_mask = BadWords([(1, 2)], 30)
    setup.add(*items)
    assert [len(setup.turn().slots) for _ in range(8)] == [3] * 8


def test_a_mask_that_fails_ends_its_request_alone() -> None:
    class Failing(BadWords):
        def push(self, token: int) -> None:
            if len(self._recent) == 1:
                raise ValueError("nothing can follow")
            super().push(token)

    setup = Setup(num_slots=2)
    items = [request(n, 3, 20, ignore_eos=True) for n in range(2)]
    items[0].token_mask = Failing([(1, 2)], 30)
    setup.add(*items)
    setup.finish()
    assert (items[0].finish_reason, str(items[0].error)) == ("error", "nothing can follow")
    assert len(items[0].output_token_ids) == 2
    check_output(items[1])


def test_preempted_requests_keep_their_limits(model: Path, blind: None) -> None:
    sizes = SIZES | {"max_num_seqs": 5, "max_num_batched_tokens": 7, "num_gpu_blocks_override": 12}
    params = [
        greedy(max_tokens=30, logit_bias={30: 5.0}, bad_words=["the", "and"]),
        greedy(max_tokens=30, allowed_token_ids=list(range(50))),
        greedy(max_tokens=30),
        greedy(max_tokens=30, bad_words=["ain", "th"], prompt_logprobs=2),
    ] * 3
    with LLM(model, **SIZES) as llm:
        expected = generate(llm, PROMPTS * 3, params)
    with LLM(model, schedule="overlap", **sizes) as llm:
        outputs = generate(llm, PROMPTS * 3, params)
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics) > 0
    for output, other in zip(outputs, expected, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        assert len(output.prompt_logprobs or ()) == len(other.prompt_logprobs or ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {400_000: 1.0}}, r"logit_bias \[400000\] are outside the vocabulary"),
        ({"allowed_token_ids": [1, -1]}, r"allowed_token_ids \[-1\] are outside the vocabulary"),
        ({"allowed_token_ids": [400_000]}, r"allowed_token_ids \[400000\] are outside the vocab"),
        (
            {"allowed_token_ids": [3], "bad_words": ["the"], "logit_bias": {-2: 0}},
            r"logit_bias \[-2\] are outside",
        ),
    ],
)
def test_what_a_model_has_not_is_named(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(llm, [[5]], SamplingParams(**options))
    params = [SamplingParams(**options), greedy()]
    bad, good = generate(llm, [[5], [5]], params)
    assert bad.outputs[0].finish_reason == "error" and good.outputs[0].finish_reason == "length"


def test_bad_words_may_not_ban_everything(llm: LLM, model: Path) -> None:
    token = llm.get_tokenizer().encode("the", add_special_tokens=False)
    assert len(token) == 1
    params = SamplingParams(allowed_token_ids=token, bad_words=["the"])
    with pytest.raises(ValueError, match="bad_words leave no token of allowed_token_ids"):
        generate(llm, [[5]], params)
    with (
        LLM(model, skip_tokenizer_init=True, **SIZES) as bare,
        pytest.raises(ValueError, match="bad_words need the tokenizer"),
    ):
        generate(bare, [[5]], SamplingParams(bad_words=["the"], detokenize=False))


@pytest.mark.parametrize("device", DEVICES)
def test_limits_hold_in_half_precision(tmp_path: Path, device: str) -> None:
    """Biases move what is greedy, beside the plain logprobs; only allowed tokens are drawn."""
    model = write_config(tmp_path, **SHAPES["llama3-d64"])
    sizes: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "max_model_len": 192}
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 150, length).tolist() for length in (1, 60, 9, 30)]
    bias = dict(zip(rng.permutation(160)[:80].tolist(), rng.uniform(-2, 2, 80), strict=True))
    allowed = [3, 31, 32, 100, 159]
    params = [
        greedy(max_tokens=40, logit_bias=bias, logprobs=20),
        SamplingParams(seed=1, max_tokens=40, ignore_eos=True, allowed_token_ids=allowed),
    ] * 2
    with LLM(
        model,
        device=device,
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=SMALL_CACHE,
        **sizes,
    ) as llm:
        outputs = [output.outputs[0] for output in generate(llm, prompts, params)]
    for biased, limited in zip(outputs[::2], outputs[1::2], strict=True):
        for token, entries in zip(biased.token_ids, biased.logprobs or [], strict=True):
            scores = {t: entry.logprob + bias.get(t, 0.0) for t, entry in entries.items()}
            assert scores[token] >= max(scores.values()) - 1e-4
        assert set(limited.token_ids) <= set(allowed) and len(set(limited.token_ids)) > 1
