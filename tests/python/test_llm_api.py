"""LLM on a tiny random model: what users call, what they get back, and what wrong calls say."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow import LLM, EngineError, SamplingParams
from nanoflow.outputs import RequestOutput

MAX_MODEL_LEN = 64
SIZES: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "block_size": 8, "max_num_seqs": 16}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **SIZES) as llm:
        yield llm


def generate(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_outputs_have_the_fields_of_vllm(llm: LLM) -> None:
    [output] = generate(llm, "the quick fox")
    assert output.prompt == "the quick fox"
    assert output.prompt_token_ids == llm.get_tokenizer().encode("the quick fox")
    assert output.finished and output.error is None and output.num_cached_tokens == 0
    assert output.metrics is not None
    assert output.metrics.arrival_time < output.metrics.first_token_time
    [completion] = output.outputs
    assert completion.index == 0 and completion.finished()
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert len(completion.token_ids) == 12
    assert completion.text == llm.get_tokenizer().decode(completion.token_ids)


def test_every_form_of_a_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("again and again")
    forms = [
        "again and again",
        {"prompt": "again and again"},
        {"prompt_token_ids": ids},
        {"prompt_token_ids": np.array(ids), "prompt": "as text"},
        ids,
    ]
    outputs = generate(llm, forms)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert [output.prompt for output in outputs[:4]] == ["again and again"] * 2 + [None, "as text"]
    for form in forms:
        assert texts(generate(llm, form)) == texts(outputs[:1])
    assert generate(llm, []) == []


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"number {n}" for n in range(40)]
    params = [SamplingParams(temperature=0, max_tokens=1 + n * 7 % 13) for n in range(40)]
    outputs = generate(llm, prompts, params)
    assert [output.prompt for output in outputs] == prompts
    for output, one in zip(outputs, params, strict=True):
        assert 1 <= len(output.outputs[0].token_ids) <= (one.max_tokens or 0)
    numbers = [int(output.request_id) for output in outputs]
    assert numbers == list(range(numbers[0], numbers[0] + 40))


def test_a_seed_decides_the_tokens_whatever_runs_beside(llm: LLM) -> None:
    params = SamplingParams(seed=5, max_tokens=20, ignore_eos=True)
    [alone] = generate(llm, "the", params)
    others = [SamplingParams(max_tokens=20) for _ in range(10)]
    beside = generate(llm, ["the"] * 11, [*others, params])[-1]
    assert alone.outputs[0].token_ids == beside.outputs[0].token_ids
    unseeded = generate(llm, ["the"] * 2, SamplingParams(max_tokens=20, ignore_eos=True))
    assert unseeded[0].outputs[0].token_ids != unseeded[1].outputs[0].token_ids


def test_the_seed_of_the_llm_decides_the_rest(model: Path, llm: LLM) -> None:
    def first_tokens(seed: int) -> list[int]:
        with LLM(model, seed=seed, **SIZES) as fresh:
            return generate(fresh, "the", SamplingParams(ignore_eos=True))[0].outputs[0].token_ids

    assert first_tokens(1) == first_tokens(1) != first_tokens(2)


def test_stop_strings_span_tokens_and_end_the_text(llm: LLM) -> None:
    params = SamplingParams(seed=3, max_tokens=40, ignore_eos=True)
    [whole] = generate(llm, "the", params)
    text, ids = whole.outputs[0].text, whole.outputs[0].token_ids
    candidates = [text[i : i + 3] for i in range(5, len(text) - 2)]
    stop = next(part for part in candidates if "\ufffd" not in part and part.strip())
    for keep in (False, True):
        params = SamplingParams(
            seed=3,
            max_tokens=40,
            ignore_eos=True,
            stop=["never", stop],
            include_stop_str_in_output=keep,
        )
        [output] = generate(llm, "the", params)
        completion = output.outputs[0]
        end = text.index(stop)
        assert completion.text == text[: end + len(stop) if keep else end]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert completion.token_ids == ids[: len(completion.token_ids)]
        assert stop in llm.get_tokenizer().decode(completion.token_ids)


def test_stop_tokens_stay_in_the_ids_and_leave_the_text(llm: LLM) -> None:
    [whole] = generate(llm, "the")
    ids = whole.outputs[0].token_ids
    stop = next(token for token in ids[2:] if token not in ids[:2])
    end = ids.index(stop)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    completion = generate(llm, "the", params)[0].outputs[0]
    assert completion.token_ids == ids[: end + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text == llm.get_tokenizer().decode(ids[:end])
    params.include_stop_str_in_output = True
    completion = generate(llm, "the", params)[0].outputs[0]
    assert completion.text == llm.get_tokenizer().decode(ids[: end + 1])
    params.min_tokens = end + 1
    completion = generate(llm, "the", params)[0].outputs[0]
    assert stop not in completion.token_ids[: end + 1]


def test_the_end_of_sequence_ends_a_generation(model: Path, llm: LLM) -> None:
    eos = llm.get_tokenizer().eos_token_id
    params = [SamplingParams(seed=n, max_tokens=60, temperature=3.0) for n in range(50)]
    outputs = [output.outputs[0] for output in generate(llm, ["a"] * 50, params)]
    ended = [output for output in outputs if output.finish_reason == "stop"]
    assert ended, "no seed ends"
    for output in ended:
        assert output.token_ids[-1] == eos and output.token_ids.count(eos) == 1
        assert output.stop_reason is None
        assert "</s>" not in output.text


def test_requests_end_at_the_longest_length(llm: LLM) -> None:
    [output] = generate(llm, "the", SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == MAX_MODEL_LEN
    [output] = generate(llm, "the", SamplingParams(max_tokens=1000, ignore_eos=True))
    assert output.outputs[0].finish_reason == "length"
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == MAX_MODEL_LEN


def test_without_text(model: Path, llm: LLM) -> None:
    [output] = generate(llm, "the", SamplingParams(temperature=0, detokenize=False))
    assert output.outputs[0].text == "" and output.outputs[0].token_ids
    with LLM(model, skip_tokenizer_init=True, **SIZES) as bare:
        [output] = generate(bare, {"prompt_token_ids": [5, 6, 7]})
        assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 12
        for call in (bare.get_tokenizer, lambda: generate(bare, "text")):
            with pytest.raises(ValueError, match="skip_tokenizer_init=True left it out"):
                call()


def test_chat_writes_the_prompt_by_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    [output] = llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt == "<|user|>hello</s>\n<|assistant|>"
    assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt, False)
    assert len(llm.chat([messages] * 3, GREEDY, use_tqdm=False)) == 3
    [output] = llm.chat(messages, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert output.prompt == "<|user|>hello</s>\n"
    template = "{{ tools | length }}{% for m in messages %}{{ m.content }}.{% endfor %}"
    own: dict[str, Any] = {"chat_template": template, "tools": [{}, {}], "use_tqdm": False}
    [output] = llm.chat(messages, GREEDY, **own)
    assert output.prompt == "2hello."
    own |= {"add_generation_prompt": False, "continue_final_message": True}
    [output] = llm.chat(messages, GREEDY, **own)
    assert output.prompt == "2hello"
    for wrong in ("hello", [["hello"]], {"role": "user"}):
        with pytest.raises(TypeError, match="messages"):
            llm.chat(wrong, GREEDY)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["nano", "overlap"])
def test_schedules_and_budgets_change_no_token(
    schedule: str, model: Path, llm: LLM, blind: None
) -> None:
    prompts = [f"{n} quick foxes " * (1 + n % 4) for n in range(30)]
    expected = texts(generate(llm, prompts))
    sizes = SIZES | {"max_num_seqs": 5, "max_num_batched_tokens": 7, "num_gpu_blocks_override": 10}
    with LLM(model, schedule=schedule, async_scheduling=schedule == "nano", **sizes) as other:
        outputs = generate(other, prompts)
        assert texts(outputs) == expected
        assert sum(output.metrics.num_preemptions for output in outputs if output.metrics) > 0


def test_one_bad_prompt_of_64_fails_alone(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    prompts: list[Any] = [f"number {n}" for n in range(64)]
    good = texts(generate(llm, prompts))
    prompts[17] = {"prompt_token_ids": [3, 100_000]}
    with caplog.at_level(logging.WARNING):
        outputs = generate(llm, prompts)
    assert outputs[17].error == (
        "the prompt holds token id 100000, outside the vocabulary of "
        f"{llm.get_tokenizer().vocab_size} tokens"
    )
    assert outputs[17].outputs[0].finish_reason == "error"
    assert outputs[17].outputs[0].token_ids == []
    assert "1 of 64 prompts cannot be run; prompts[17]: the prompt holds" in caplog.text
    assert texts(outputs[:17] + outputs[18:]) == good[:17] + good[18:]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ([5] * 64, "the prompt has 64 tokens, but max_model_len is 64"),
        ([5, -1], "token id -1, outside the vocabulary"),
        ("\ud800", "the prompt is no valid Unicode text: .*surrogates not allowed"),
    ],
)
def test_a_bad_prompt_alone_raises(llm: LLM, prompt: Any, message: str) -> None:
    for prompts in (prompt, [prompt, prompt]):
        with pytest.raises(ValueError, match=message):
            generate(llm, prompts)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (3, "prompts are a int"),
        ([3.5], "a prompt is a float"),
        ({"text": "x"}, "a prompt has an unknown key 'text'"),
        ({}, "a prompt has no key"),
        ({"prompt": 3}, "'prompt' is a int"),
        ({"prompt_token_ids": "12"}, "a prompt is a str"),
        ([[1, "x"]], "a prompt is a list"),
    ],
)
def test_a_prompt_of_another_type_raises(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        generate(llm, prompts)


def test_sampling_params_must_fit_the_prompts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="there are 2 prompts but 3 sampling_params"):
        generate(llm, ["a", "b"], [GREEDY] * 3)
    with pytest.raises(TypeError, match="sampling_params must be"):
        generate(llm, "a", {"temperature": 0})
    with pytest.raises(ValueError, match=r"stop_token_ids \[9999\] are outside"):
        generate(llm, "a", SamplingParams(stop_token_ids=[9999]))


def test_another_thread_may_abort_all(llm: LLM) -> None:
    outputs: list[RequestOutput] = []
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = ["again and again"] * 400
    thread = threading.Thread(target=lambda: outputs.extend(generate(llm, prompts, params)))
    begun = threading.Event()
    llm.step_listener = lambda stats: begun.set()
    thread.start()
    begun.wait()
    llm.abort()
    thread.join()
    llm.step_listener = None
    assert {output.outputs[0].finish_reason for output in outputs[-100:]} == {"abort"}
    assert texts(generate(llm, "the quick fox"))[0]


def test_a_timeout_ends_requests_with_what_there_is(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, stop="never said by this model")
    outputs = llm.generate([[1, 2, 3]] * 40, params, use_tqdm=False, timeout=1e-4)
    assert {output.outputs[0].stop_reason for output in outputs} == {"timeout"}
    assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
    with pytest.raises(ValueError, match="timeout=0 must be above 0 seconds"):
        llm.generate([[1, 2, 3]], params, timeout=0)
    with pytest.raises(TypeError, match="timeout='1' must be a number of seconds"):
        llm.generate([[1, 2, 3]], params, timeout="1")  # type: ignore[arg-type]


def test_prompts_beyond_the_limit_of_the_queue_fail_alone(model: Path) -> None:
    with LLM(model, max_num_queued_reqs=3, **SIZES) as llm:
        outputs = llm.generate([[1, 2, 3]] * 8, GREEDY, use_tqdm=False)
    assert [output.error is None for output in outputs] == [True] * 3 + [False] * 5
    assert "the queue is full: 3 reqs wait and max_num_queued_reqs=3" in str(outputs[-1].error)


def test_a_closed_llm_says_so(model: Path) -> None:
    with LLM(model, **SIZES) as llm:
        generate(llm, "the")
    llm.close()
    with pytest.raises(EngineError, match="has been closed"):
        generate(llm, "the")


def test_defaults_come_from_the_generation_config(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.25, "top_p": 0.5, "top_k": 7, "repetition_penalty": 1.3,'
        ' "eos_token_id": [2, 11]}'
    )
    with LLM(tmp_path, **SIZES) as llm:
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.top_p, params.top_k) == (0.25, 0.5, 7)
        assert params.repetition_penalty == 1.3
        params.temperature = 0.0
        params.max_tokens = 60
        tokens = generate(llm, ["a", "b", "c", "d"], params)
        for output in tokens:
            assert not {2, 11} & set(output.outputs[0].token_ids[:-1])
