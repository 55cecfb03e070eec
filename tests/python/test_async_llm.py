"""AsyncLLM on a tiny random model: streams give what LLM.generate gives, whatever befalls them."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nanoflow import LLM, AsyncLLM, EngineError, RequestOutput, RequestOutputKind, SamplingParams
from nanoflow.scheduler.engine import StepHandle

SIZES: dict[str, Any] = {
    "max_model_len": 64,
    "block_size": 8,
    "max_num_seqs": 16,
    "device": "cpu",
    "enable_prefix_caching": False,
}
PROMPTS = [f"number {n} again and again" for n in range(24)]
CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
TIMEOUT = 60.0
T = TypeVar("T")


@pytest.fixture(scope="module")
def expected(model: Path) -> Iterator[Callable[[list[SamplingParams]], list[RequestOutput]]]:
    """What LLM.generate gives for the first of PROMPTS."""
    with LLM(model, **SIZES) as llm:
        yield lambda params: llm.generate(PROMPTS[: len(params)], params, use_tqdm=False)


@pytest.fixture
def engine(model: Path) -> Iterator[AsyncLLM]:
    """Whose pages must all be free, and whose scheduler whole, when a test is done."""
    engine = AsyncLLM(model, **SIZES)
    yield engine
    engine.shutdown()
    state = engine._runtime.state
    state.reclaim(10**9)
    state.check_integrity()
    assert not state.has_requests and not engine._streams
    assert state.pages.num_free == state.pages.num_pages


def run(awaitable: Awaitable[T]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(awaitable, TIMEOUT)

    return asyncio.run(limited())


def sampling(seed: int = 0, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"seed": seed, "max_tokens": 20, "ignore_eos": True} | changes)


async def collect(outputs: AsyncIterator[RequestOutput], pause: float = 0.0) -> list[RequestOutput]:
    found = []
    async for output in outputs:
        found.append(output)
        await asyncio.sleep(pause)
    return found


async def collect_all(
    engine: AsyncLLM, params: list[SamplingParams], name: str = "r"
) -> list[list[RequestOutput]]:
    streams = [engine.generate(PROMPTS[n], one, f"{name}{n}") for n, one in enumerate(params)]
    return list(await asyncio.gather(*map(collect, streams)))


def join(outputs: list[RequestOutput], kind: RequestOutputKind) -> tuple[str, list[int], Any]:
    """Text, tokens and log-probabilities of a whole stream."""
    completions = [output.outputs[0] for output in outputs]
    if kind is not DELTA:
        return completions[-1].text, completions[-1].token_ids, completions[-1].logprobs
    logprobs = None
    if completions[-1].logprobs is not None:
        logprobs = [entry for one in completions for entry in one.logprobs or ()]
    ids = [token for one in completions for token in one.token_ids]
    return "".join(one.text for one in completions), ids, logprobs


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_streams_give_what_generate_gives(engine: AsyncLLM, expected: Any, kind: Any) -> None:
    params = [
        sampling(n, logprobs=2 if n % 3 == 0 else None, output_kind=kind, ignore_eos=n % 2 == 0)
        for n in range(len(PROMPTS))
    ]
    streams = run(collect_all(engine, params))
    for n, (outputs, whole) in enumerate(zip(streams, expected(params), strict=True)):
        [completion] = whole.outputs
        assert join(outputs, kind) == (completion.text, completion.token_ids, completion.logprobs)
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        last = outputs[-1]
        assert (last.request_id, last.prompt) == (f"r{n}", PROMPTS[n])
        assert last.prompt_token_ids == whole.prompt_token_ids
        assert last.outputs[0].finish_reason == completion.finish_reason
        assert last.outputs[0].cumulative_logprob == completion.cumulative_logprob
    if kind is FINAL_ONLY:
        assert {len(outputs) for outputs in streams} == {1}
    else:
        assert max(map(len, streams)) > 5


def test_cumulative_outputs_grow(engine: AsyncLLM) -> None:
    [outputs] = run(collect_all(engine, [sampling(max_tokens=30)]))
    assert len(outputs) > 5
    for before, after in itertools.pairwise(outputs):
        one, two = before.outputs[0], after.outputs[0]
        assert two.text.startswith(one.text)
        assert two.token_ids[: len(one.token_ids)] == one.token_ids
        assert len(two.token_ids) > len(one.token_ids)
        assert one.finish_reason is None and before.metrics is None


@pytest.mark.parametrize("keep", [False, True])
def test_no_part_of_a_stop_string_is_shown(engine: AsyncLLM, expected: Any, keep: bool) -> None:
    text = expected([sampling(3, max_tokens=40)])[0].outputs[0].text
    stop = next(
        part
        for part in (text[i : i + 4] for i in range(8, len(text)))
        if "\ufffd" not in part and len(part.strip()) == 4
    )
    params = [
        sampling(3, max_tokens=40, stop=[stop], include_stop_str_in_output=keep, output_kind=DELTA)
    ]
    [outputs] = run(collect_all(engine, params))
    [whole] = expected(params)
    assert join(outputs, DELTA)[0] == whole.outputs[0].text
    assert whole.outputs[0].text.endswith(stop) == keep
    assert outputs[-1].outputs[0].stop_reason == stop


def test_a_slow_reader_gets_fewer_outputs(engine: AsyncLLM, expected: Any) -> None:
    params = sampling(1, max_tokens=50, output_kind=DELTA)

    async def read() -> list[list[RequestOutput]]:
        slow = collect(engine.generate(PROMPTS[0], params, "slow"), pause=0.2)
        fast = (collect(engine.generate(PROMPTS[0], params, f"fast{n}")) for n in range(3))
        return list(await asyncio.gather(slow, *fast))

    slow, *fast = run(read())
    assert len(slow) < max(map(len, fast))
    [whole] = expected([params])
    for outputs in (slow, *fast):
        assert join(outputs, DELTA)[1] == whole.outputs[0].token_ids


def test_aborts_at_any_moment(engine: AsyncLLM, expected: Any) -> None:
    params = [sampling(n, max_tokens=40) for n in range(len(PROMPTS))]

    async def abort_after(n: int) -> list[RequestOutput]:
        found = []
        stream = engine.generate(PROMPTS[n], params[n], f"r{n}")
        if n % 6 == 0:  # before it has become a request
            first = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            await engine.abort(f"r{n}")
            found.append(await first)
        async for output in stream:
            found.append(output)
            if len(found) == 1 + n // 3:
                await engine.abort([f"r{n}", "nobody"])
        return found

    async def read() -> list[list[RequestOutput]]:
        return list(await asyncio.gather(*map(abort_after, range(len(PROMPTS)))))

    reasons = []
    for outputs, whole in zip(run(read()), expected(params), strict=True):
        completion = outputs[-1].outputs[0]
        reasons.append(completion.finish_reason)
        length = len(completion.token_ids)
        assert completion.token_ids == whole.outputs[0].token_ids[:length]
        assert whole.outputs[0].text.startswith(completion.text.rstrip("\ufffd"))
    assert reasons.count("abort") > 8


def test_a_reader_that_leaves_aborts_its_request(engine: AsyncLLM) -> None:
    params = sampling(max_tokens=60)

    async def leave() -> None:
        async for _ in engine.generate(PROMPTS[0], params, "left"):
            break
        task = asyncio.create_task(collect(engine.generate(PROMPTS[1], params, "cancelled")))
        await anext(other := engine.generate(PROMPTS[2], params, "other"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        [last] = (await collect(other))[-1:]
        assert len(last.prompt_token_ids) + len(last.outputs[0].token_ids) == 64
        again = await collect(engine.generate(PROMPTS[1], sampling(), "cancelled"))
        assert len(again[-1].outputs[0].token_ids) == 20

    run(leave())


def test_event_loops_in_several_threads(engine: AsyncLLM, expected: Any) -> None:
    params = [sampling(n, output_kind=DELTA if n % 2 else CUMULATIVE) for n in range(12)]
    found: dict[str, list[list[RequestOutput]]] = {}

    def serve(name: str) -> None:
        found[name] = run(collect_all(engine, params, name))

    threads = [threading.Thread(target=serve, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    for name in "abc":
        for outputs, one, whole in zip(found[name], params, expected(params), strict=True):
            assert join(outputs, one.output_kind)[1] == whole.outputs[0].token_ids


def test_a_closed_event_loop_ends_its_requests_alone(engine: AsyncLLM, expected: Any) -> None:
    loop = asyncio.new_event_loop()
    stream = engine.generate(PROMPTS[0], sampling(max_tokens=60), "lost")
    loop.run_until_complete(anext(stream))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()  # without shutdown_asyncgens
    [outputs] = run(collect_all(engine, [sampling()]))
    assert outputs[-1].outputs[0].token_ids == expected([sampling()])[0].outputs[0].token_ids
    with pytest.raises(StopIteration):  # it has nothing to wait for
        stream.aclose().send(None)


def test_an_engine_failure_reaches_every_stream(model: Path, monkeypatch: Any) -> None:
    engine = AsyncLLM(model, **SIZES)

    class Failing:
        step = 0

        def wait(self) -> Any:
            raise RuntimeError("planted failure")

    async def read() -> None:
        tasks = [
            asyncio.create_task(collect(engine.generate(prompt, sampling(max_tokens=50), prompt)))
            for prompt in PROMPTS
        ]
        await anext(engine.generate("one", sampling(max_tokens=50), "first"))

        def complete(*_: Any) -> StepHandle:
            return Failing().wait()

        monkeypatch.setattr(engine._runtime.state, "complete_step", complete, raising=True)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineError)
            assert str(result.__cause__) == "planted failure"
        with pytest.raises(EngineError, match="planted failure"):
            await engine.check_health()
        with pytest.raises(EngineError, match="has failed and is closed: planted failure"):
            await collect(engine.generate("late", sampling(), "late"))
        assert engine.errored

    run(read())
    engine.shutdown()


def test_shutdown_ends_open_streams(engine: AsyncLLM) -> None:
    async def read() -> None:
        await engine.check_health()
        stream = engine.generate(PROMPTS[0], sampling(max_tokens=60), "open")
        first = await anext(stream)
        engine.shutdown()
        rest = await collect(stream)
        assert rest[-1].outputs[0].finish_reason == "abort"
        assert rest[-1].outputs[0].token_ids[:1] == first.outputs[0].token_ids[:1]
        with pytest.raises(EngineError, match="has been closed"):
            await collect(engine.generate("a", sampling(), "late"))

    run(read())


def test_wrong_calls_are_told_at_once(engine: AsyncLLM) -> None:
    async def fails(kind: type[Exception], message: str, *arguments: Any) -> None:
        with pytest.raises(kind, match=message):
            await collect(engine.generate(*arguments))

    async def call() -> None:
        good = sampling()
        await fails(TypeError, "takes one prompt, not 2", ["a", "b"], good, "x")
        await fails(TypeError, "request_id=7 must be a text", "a", good, 7)
        await fails(TypeError, "sampling_params must be", "a", {}, "x")
        await fails(ValueError, "the prompt is empty", {"prompt_token_ids": []}, good, "x")
        await fails(ValueError, "no valid Unicode", "\ud800", good, "x")
        await fails(ValueError, "outside the vocabulary", "a", sampling(stop_token_ids=[9999]), "x")
        stream = engine.generate("a", good, "x")
        await anext(stream)
        await fails(ValueError, "request id 'x' is in use", "a", good, "x")
        await collect(stream)
        default = engine.get_default_sampling_params()
        assert replace(default) == default
        assert (await collect(engine.generate("a", None, "x")))[-1].finished
        assert await engine.reset_prefix_cache()
        assert (await engine.get_tokenizer()).encode("a")

    run(call())


def test_readers_need_no_text(model: Path) -> None:
    engine = AsyncLLM(model, skip_tokenizer_init=True, **SIZES)
    try:
        outputs = run(collect(engine.generate([5, 6, 7], sampling(output_kind=DELTA), "ids")))
        text, ids, _ = join(outputs, DELTA)
        assert text == "" and len(ids) == 20
    finally:
        engine.shutdown()
