"""Structured outputs: whatever a random model says conforms, and nobody waits for it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanoflow import LLM, AsyncLLM, RequestOutput, SamplingParams, StructuredOutputsParams
from nanoflow.outputs import CompletionOutput
from nanoflow.run_batch.openai import parse_body
from tiny_models import write_tiny_llama

SIZES: dict[str, Any] = {"max_model_len": 512, "block_size": 16, "device": "cpu"}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", "it depends", "Übergröße", 'a "quoted" \\ one']


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(
        tmp_path_factory.mktemp("llama"), tokenizer=True, max_position_embeddings=512
    )


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **SIZES) as llm:
        yield llm


def generate(llm: LLM, params: Any, prompts: Any = "the") -> list[CompletionOutput]:
    outputs: list[RequestOutput] = llm.generate(prompts, params, use_tqdm=False)
    return [completion for output in outputs for completion in output.outputs]


def within(seed: int = 0, n: int = 12, **kind: Any) -> SamplingParams:
    """`n` random samples that conform to something."""
    structured = StructuredOutputsParams(**kind)
    return SamplingParams(
        n=n, seed=seed, temperature=1.5, max_tokens=300, structured_outputs=structured
    )


@pytest.mark.parametrize("form", [dict, json.dumps])
def test_a_schema_is_kept(llm: LLM, form: Any) -> None:
    for completion in generate(llm, within(json=form(SCHEMA), disable_any_whitespace=True)):
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        value = json.loads(completion.text)
        assert list(value) == ["name", "age", "tags", "ok"]
        assert isinstance(value["name"], str) and len(value["name"]) <= 8
        assert type(value["age"]) is int and 0 <= value["age"] <= 120
        assert len(value["tags"]) <= 3 and set(value["tags"]) <= {"red", "green", "blue"}
        assert type(value["ok"]) is bool


def test_white_space_is_as_asked(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    texts = {c.text for c in generate(llm, within(json=schema, disable_any_whitespace=True))}
    assert texts == {'{"a":null}'}
    texts = {c.text for c in generate(llm, within(json=schema, whitespace_pattern=" {0,2}"))}
    assert len(texts) > 1
    assert all(re.fullmatch(r'\{ {0,2}"a" {0,2}: {0,2}null {0,2}\}', text) for text in texts)


def test_any_json_object_begins_as_one(llm: LLM) -> None:
    for completion in generate(llm, within(json_object=True, n=4)):
        assert completion.text.startswith("{")
        if completion.finish_reason == "stop":
            assert isinstance(json.loads(completion.text), dict)


def test_a_choice_is_one_of_them(llm: LLM) -> None:
    texts = {c.text for c in generate(llm, within(choice=CHOICES, n=40))}
    assert texts <= set(CHOICES) and len(texts) > 2


def test_an_expression_is_matched_as_a_whole(llm: LLM) -> None:
    expression = r"[a-f]{2,5}-([0-9]{2}|x+y){1,2}!"
    completions = generate(llm, within(regex=expression, n=20))
    found = [c.text for c in completions if c.finish_reason == "stop"]
    assert len(set(found)) > 5
    assert [text for text in found if not re.fullmatch(expression, text)] == []


@pytest.mark.parametrize(
    "grammar",
    [
        'start: item ("," item)* "."\nitem: "cat" | "dog" NUMBER\nNUMBER: /[0-9]{1,2}/',
        'root ::= item ("," item)* "."\nitem ::= "cat" | "dog" [0-9] [0-9]?',
    ],
)
def test_a_grammar_is_kept(llm: LLM, grammar: str) -> None:
    completions = generate(llm, within(grammar=grammar))
    found = [c.text for c in completions if c.finish_reason == "stop"]
    assert found
    for text in found:
        assert re.fullmatch(r"(cat|dog\d{1,2})(,(cat|dog\d{1,2}))*\.", text), text


def test_samples_depend_on_nothing_else(model: Path, llm: LLM, blind: None) -> None:
    """Neither on preemption nor schedule, nor on the requests beside them."""
    params = [
        within(seed, n=1, json=SCHEMA, disable_any_whitespace=True)
        if seed % 2
        else SamplingParams(
            seed=seed, max_tokens=100, ignore_eos=True, bad_words=["the cat", "ain"]
        )
        for seed in range(8)
    ]
    alone = [generate(llm, one)[0].token_ids for one in params]
    sizes = SIZES | {"max_model_len": 330, "num_gpu_blocks_override": 24}
    with LLM(model, schedule="overlap", max_num_seqs=6, **sizes) as other:
        outputs = other.generate(["the"] * 8, params, use_tqdm=False)
        assert sum(output.metrics.num_preemptions for output in outputs if output.metrics) > 0
        assert [output.outputs[0].token_ids for output in outputs] == alone


def test_others_take_as_many_steps_as_without(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    steps: list[tuple[int, int]] = []
    llm.step_listener = lambda stats: steps.append((stats.decode_tokens, stats.running))
    try:
        generate(llm, [plain] * 3, ["the", "a", "lazy"])
        alone, steps[:] = len(steps), []
        short = SamplingParams(
            max_tokens=25, structured_outputs=StructuredOutputsParams(regex="a*")
        )
        generate(llm, [plain, short, plain, plain], ["the", "x", "a", "lazy"])
        assert len(steps) == alone
    finally:
        llm.step_listener = None


def test_min_tokens_does_not_break_a_grammar(llm: LLM) -> None:
    """What is complete ends; what may go on does so."""
    params = within(choice=["a", "no"], n=8)
    params.min_tokens = 20
    assert {c.text for c in generate(llm, params)} <= {"a", "no"}
    params = within(regex="[ab]{1,30}", n=8)
    params.min_tokens = 10
    for completion in generate(llm, params):
        assert len(completion.token_ids) >= 10 and re.fullmatch("[ab]{1,30}", completion.text)


def test_behind_an_ignored_end_all_is_allowed(llm: LLM) -> None:
    params = within(choice=["the"], n=1)
    params.ignore_eos, params.max_tokens = True, 30
    [completion] = generate(llm, params)
    assert completion.text.startswith("the") and len(completion.token_ids) == 30
    assert completion.finish_reason == "length"


def test_limits_go_together(llm: LLM) -> None:
    params = within(choice=["yes", "no", "dog"], n=20)
    params.bad_words = ["dog"]
    params.logit_bias = {llm.get_tokenizer().encode("no")[0]: 100.0}
    assert {c.text for c in generate(llm, params)} == {"no"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"json": {"type": 5}}, "structured outputs: type must be a string"),
        ({"json": '{"type": '}, "the JSON schema is no JSON"),
        ({"json": {"type": {1}}}, "the JSON schema is no JSON"),
        ({"regex": "(("}, "structured outputs: .*regex"),
        ({"grammar": "start: nobody"}, "structured outputs: .*nobody"),
        ({"grammar": "nonsense"}, "structured outputs: "),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "structured outputs: "),
        ({"json": {"$ref": "#"}}, "structured outputs: NoExtensionBias$"),
    ],
)
def test_what_is_not_valid_fails_alone(llm: LLM, kind: dict[str, Any], message: str) -> None:
    bad, good = within(n=1, **kind), SamplingParams(max_tokens=3, ignore_eos=True)
    with pytest.raises(ValueError, match=message):
        generate(llm, bad)
    failed, fine = llm.generate(["a", "b"], [bad, good], use_tqdm=False)
    assert re.search(message, failed.error or "")
    assert (failed.outputs[0].finish_reason, fine.outputs[0].finish_reason) == ("error", "length")


def test_an_async_request_fails_alone(model: Path) -> None:
    async def call() -> None:
        engine = AsyncLLM(model, **SIZES)
        try:
            with pytest.raises(ValueError, match=r"structured outputs: .*regex"):
                async for _ in engine.generate("a", within(regex="((", n=1), "bad"):
                    pass
            good = [o async for o in engine.generate("a", within(choice=["yes"], n=2), "good")]
            assert [sample.text for sample in good[-1].outputs] == ["yes", "yes"]
        finally:
            engine.shutdown()

    asyncio.run(call())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "exactly one of json, regex, .* but none is given"),
        ({"regex": "a", "choice": ["b"]}, ValueError, "but regex, choice are given"),
        ({"choice": []}, ValueError, r"choice=\[\] must hold texts"),
        ({"choice": ["a", ""]}, ValueError, "none of them empty"),
        ({"regex": "a", "disable_any_whitespace": True}, ValueError, "are for json"),
        (
            {"json": "{}", "disable_any_whitespace": True, "whitespace_pattern": " "},
            ValueError,
            "exclude each other",
        ),
        ({"json": 3}, TypeError, "json=3 must be a JSON schema"),
        ({"choice": "ab"}, TypeError, "choice='ab' must be a list of texts"),
        ({"regex": 3}, TypeError, "regex=3 must be a text"),
        ({"json_object": "yes"}, TypeError, "json_object='yes' must be True or False"),
        ({"structural_tag": "x"}, TypeError, "structural_tag"),
    ],
)
def test_a_wrong_value_is_named(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        StructuredOutputsParams(**options)


def test_a_tokenizer_is_needed(model: Path) -> None:
    with (
        LLM(model, skip_tokenizer_init=True, **SIZES) as llm,
        pytest.raises(ValueError, match="structured outputs need the tokenizer"),
    ):
        generate(llm, within(choice=["a"], n=1), [[5]])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
    ],
)
def test_bodies_of_batches_ask_for_it(body: dict[str, Any], expected: dict[str, Any]) -> None:
    work = parse_body("/v1/completions", {"prompt": "a", **body}, SamplingParams(), None)
    wanted = None if expected is None else StructuredOutputsParams(**expected)
    assert work.params.structured_outputs == wanted


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ({"response_format": {"type": "yaml"}}, ValueError, "must have the type text, json_object"),
        ({"response_format": {"type": "json_schema"}}, ValueError, "a json_schema with a schema"),
        ({"structured_outputs": "json"}, TypeError, "structured_outputs='json' must be an object"),
        ({"structured_outputs": {"choice": []}}, ValueError, "must hold texts"),
        ({"structured_outputs": {"xml": "a"}}, ValueError, "has no 'xml'; it has json, regex"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}},
            ValueError,
            "exclude each other",
        ),
    ],
)
def test_bad_bodies_are_named(body: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        parse_body("/v1/completions", {"prompt": "a", **body}, SamplingParams(), None)
