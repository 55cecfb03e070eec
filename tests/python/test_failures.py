"""What fails alone, and what survives a failure of the engine, on a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanoflow import LLM, AsyncLLM, EngineError, SamplingParams
from nanoflow.detokenizer import IncrementalDetokenizer
from nanoflow.errors import StepError, TextError
from nanoflow.tokenizer import Tokenizer

SIZES: dict[str, Any] = {"max_model_len": 64, "block_size": 8, "max_num_seqs": 4, "device": "cpu"}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [f"the quick fox number {n}" for n in range(12)]


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **SIZES) as llm:
        yield llm


class FailingEngine:
    """A real engine, some of whose steps are reported to have failed when they are waited for."""

    def __init__(self, engine: Any, fail_at: tuple[int, ...]) -> None:
        self.engine = engine
        self.fail_at = fail_at
        self.restarts = 0

    def submit(self, batch: Any) -> Any:
        handle = self.engine.submit(batch)
        return FailedHandle(handle) if handle.step in self.fail_at else handle

    def restart(self) -> None:
        self.restarts += 1
        self.engine.restart()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class FailedHandle:
    def __init__(self, handle: Any) -> None:
        self.step = handle.step
        self.handle = handle

    def is_done(self) -> bool:
        return self.handle.is_done()

    def wait(self) -> Any:
        self.handle.wait()
        raise EngineError("planted failure of an op")


def plant(monkeypatch: pytest.MonkeyPatch, fail_at: tuple[int, ...]) -> list[FailingEngine]:
    from nanoflow import runtime

    made: list[FailingEngine] = []

    def loop(engine: Any, *arguments: Any, **options: Any) -> Any:
        made.append(FailingEngine(engine, fail_at))
        return runtime_loop(made[-1], *arguments, **options)

    runtime_loop = runtime.SchedulerLoop
    monkeypatch.setattr(runtime, "SchedulerLoop", loop)
    return made


def test_prompts_that_wait_outlive_a_failure_of_the_engine(
    model: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
    made = plant(monkeypatch, fail_at=(5,))
    with LLM(model, **SIZES) as failing:
        outputs = failing.generate(PROMPTS, GREEDY, use_tqdm=False)
        again = failing.generate(PROMPTS, GREEDY, use_tqdm=False)
    [engine] = made
    failed = [output for output in outputs if output.error is not None]
    assert 0 < len(failed) <= 4 and engine.restarts == 1
    for output, tokens in zip(outputs, expected, strict=True):
        if output.error is None:
            assert output.outputs[0].token_ids == tokens
        else:
            assert "the engine failed while it ran: planted failure of an op" in output.error
            assert output.outputs[0].finish_reason == "error"
    assert [output.outputs[0].token_ids for output in again] == expected


def test_an_engine_that_fails_twice_raises(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, fail_at=(5, 9))
    with LLM(model, **SIZES) as failing:
        with pytest.raises(EngineError, match="has failed and is closed: planted failure") as info:
            failing.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert not isinstance(info.value, StepError)
        with pytest.raises(EngineError, match="has failed and is closed"):
            failing.generate(PROMPTS, GREEDY, use_tqdm=False)


def test_a_prompt_on_which_the_tokenizer_fails_fails_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, encode_batch = Tokenizer.encode, Tokenizer.encode_batch

    def failing(self: Tokenizer, text: str, *rest: Any) -> Any:
        if "number 3" in text:
            raise RuntimeError("planted")
        return encode(self, text, *rest)

    def failing_batch(self: Tokenizer, texts: Any, *rest: Any) -> Any:
        if any("number 3" in text for text in texts):
            raise RuntimeError("planted")
        return encode_batch(self, texts, *rest)

    monkeypatch.setattr(Tokenizer, "encode", failing)
    monkeypatch.setattr(Tokenizer, "encode_batch", failing_batch)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [output.error is None for output in outputs] == [n != 3 for n in range(12)]
    assert outputs[3].error == "the tokenizer fails on the prompt: RuntimeError: planted"


@pytest.fixture
def failing_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of the prompt with "number 3" cannot be made."""
    push = IncrementalDetokenizer.push
    create = IncrementalDetokenizer.__init__

    def init(self: Any, tokenizer: Tokenizer, context: Any, *rest: Any) -> None:
        create(self, tokenizer, context, *rest)
        self.fails = tokenizer.decode(list(context)).endswith("number 3")

    def failing(self: Any, ids: Any) -> str:
        if self.fails:
            raise UnicodeError("planted")
        return push(self, ids)

    monkeypatch.setattr(IncrementalDetokenizer, "__init__", init)
    monkeypatch.setattr(IncrementalDetokenizer, "push", failing)


@pytest.mark.parametrize("stop", [None, "a stop string that does not come"])
def test_tokens_that_cannot_be_made_text_fail_alone(
    llm: LLM, failing_text: None, stop: str | None
) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.error is None for output in outputs] == [n != 3 for n in range(12)]
    assert "its tokens cannot be made text: UnicodeError: planted" in str(outputs[3].error)
    assert outputs[3].outputs[0].finish_reason == "error"


def test_a_stream_that_cannot_be_made_text_raises_alone(model: Path, failing_text: None) -> None:
    async def run(llm: AsyncLLM, number: int) -> int:
        async for output in llm.generate(PROMPTS[number], GREEDY, str(number)):
            count = len(output.outputs[0].token_ids)
        return count

    async def all_of_them() -> list[Any]:
        llm = AsyncLLM(model, **SIZES)
        try:
            tasks = (run(llm, n) for n in range(6))
            return await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            llm.shutdown()

    results = asyncio.run(all_of_them())
    assert isinstance(results[3], TextError)
    assert results[:3] + results[4:] == [12] * 5
