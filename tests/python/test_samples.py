"""Several samples of a prompt (n), their seeds, the sharing of their prompt, and cut prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from test_policy import Setup, check_output, request

SIZES: dict[str, Any] = {"max_model_len": 64, "block_size": 8, "device": "cpu"}
PROMPT = [3 + i % 40 for i in range(40)]


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **SIZES) as llm:
        yield llm


def generate(llm: LLM, prompts: Any, *params: SamplingParams) -> list[RequestOutput]:
    return llm.generate(prompts, list(params), use_tqdm=False)


def drawn(n: int = 1, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"n": n, "max_tokens": 10, "ignore_eos": True} | changes)


def test_each_sample_is_that_of_its_own_seed(llm: LLM) -> None:
    [output] = generate(llm, [PROMPT], drawn(4, seed=7, logprobs=1))
    alone = generate(llm, [PROMPT] * 4, *(drawn(seed=7 + i, logprobs=1) for i in range(4)))
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    for sample, single in zip(output.outputs, alone, strict=True):
        [other] = single.outputs
        assert (sample.token_ids, sample.text) == (other.token_ids, other.text)
        assert (sample.logprobs, sample.finish_reason) == (other.logprobs, "length")
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4


def test_without_a_seed_samples_differ_and_an_llm_repeats_itself(model: Path) -> None:
    found = []
    for _ in range(2):
        with LLM(model, seed=3, **SIZES) as llm:
            outputs = generate(llm, [PROMPT, [5, 6]], drawn(3), drawn(2))
            found.append([[sample.token_ids for sample in o.outputs] for o in outputs])
    assert found[0] == found[1]
    assert [len(samples) for samples in found[0]] == [3, 2]
    assert len({tuple(tokens) for tokens in found[0][0]}) == 3


def test_the_prompt_is_computed_once(model: Path) -> None:
    with LLM(model, **SIZES) as llm:
        prefilled: list[int] = []
        llm.step_listener = lambda stats: prefilled.append(stats.prefill_tokens)
        generate(llm, [PROMPT], drawn(5))
        assert sum(prefilled) == 40 + 4 * 8, "all but the page of the last token is shared"
    with LLM(model, enable_prefix_caching=False, **SIZES) as llm:
        prefilled.clear()
        llm.step_listener = lambda stats: prefilled.append(stats.prefill_tokens)
        generate(llm, [PROMPT], drawn(5))
        assert sum(prefilled) == 5 * 40


def test_a_sample_may_stop_before_the_others(llm: LLM) -> None:
    [output] = generate(llm, [[5, 6]], drawn(8, seed=1, max_tokens=12, stop=["e", "t"]))
    assert {sample.finish_reason for sample in output.outputs} == {"stop", "length"}
    for sample in output.outputs:
        assert (sample.stop_reason is None) == (sample.finish_reason == "length")
        assert not any(stop in sample.text for stop in ("e", "t"))


def test_only_those_wait_whose_page_is_being_filled() -> None:
    """The second of equal prompts starts a step later, those behind it do not wait for it."""
    setup = Setup(page_size=4, max_rows=64)
    items = [request(n, 10, 14, ignore_eos=True) for n in range(4)]
    for item in items[1:3]:
        item.prompt_token_ids = items[0].prompt_token_ids
    setup.add(*items)
    assert [item.id for _, item in setup.turn().admitted] == ["0", "3"]
    assert [item.id for _, item in setup.turn().admitted] == ["1", "2"]
    setup.finish()
    assert [item.num_cached_tokens for item in items] == [0, 8, 8, 0]
    for item in items:
        check_output(item)


def test_nobody_waits_for_one_that_has_gone() -> None:
    setup = Setup(page_size=4, max_rows=4)
    items = [request(n, 20, 24, ignore_eos=True) for n in range(2)]
    items[1].prompt_token_ids = items[0].prompt_token_ids
    setup.add(*items)
    assert [item.id for _, item in setup.turn().admitted] == ["0"]
    assert setup.turn().admitted == []
    setup.state.end("0", "abort", 0.0)
    assert [item.id for _, item in setup.turn().admitted] == ["1"]
    setup.finish()
    check_output(items[1])


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_streams_of_several_samples(model: Path, llm: LLM, kind: RequestOutputKind) -> None:
    params = drawn(3, seed=2, max_tokens=20, stop=["e"], output_kind=kind, logprobs=0)
    [whole] = generate(llm, [PROMPT], params)

    async def collect() -> list[RequestOutput]:
        engine = AsyncLLM(model, **SIZES)
        try:
            return [output async for output in engine.generate(PROMPT, params, "one")]
        finally:
            engine.shutdown()

    outputs = asyncio.run(collect())
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    if kind is RequestOutputKind.FINAL_ONLY:
        assert len(outputs) == 1
    for index, expected in enumerate(whole.outputs):
        own = [s for output in outputs for s in output.outputs if s.index == index]
        assert own[-1].finish_reason == expected.finish_reason
        if kind is not RequestOutputKind.DELTA:
            assert (own[-1].text, own[-1].token_ids) == (expected.text, expected.token_ids)
            continue
        assert "".join(sample.text for sample in own) == expected.text
        assert [token for sample in own for token in sample.token_ids] == expected.token_ids
        assert [e for sample in own for e in sample.logprobs or ()] == expected.logprobs
        assert [sample.finish_reason for sample in own[:-1]] == [None] * (len(own) - 1)


def test_samples_are_aborted_together(model: Path) -> None:
    async def abort() -> RequestOutput:
        engine = AsyncLLM(model, **SIZES)
        try:
            params = drawn(4, max_tokens=50)
            async for output in engine.generate([5, 6], params, "one"):
                if not output.finished:
                    await engine.abort("one")
            async for _ in engine.generate([5, 6], params, "left"):
                break
            state = engine._runtime.state
            while state.has_requests:  # those of the reader that has left
                await asyncio.sleep(0.01)
            return output
        finally:
            engine.shutdown()

    output = asyncio.run(asyncio.wait_for(abort(), 60))
    assert [sample.finish_reason for sample in output.outputs] == ["abort"] * 4
    assert all(len(sample.token_ids) < 50 for sample in output.outputs)


def test_prompts_are_cut_to_their_last_tokens(llm: LLM) -> None:
    prompts = [PROMPT, PROMPT[-7:], list(range(3, 83))]
    cut, short, longest = generate(
        llm,
        prompts,
        drawn(seed=1, truncate_prompt_tokens=7),
        drawn(seed=1),
        drawn(seed=1, truncate_prompt_tokens=-1),
    )
    assert cut.prompt_token_ids == PROMPT[-7:]
    assert cut.outputs[0].token_ids == short.outputs[0].token_ids
    assert longest.prompt_token_ids == list(range(20, 83)), "room for a token is left"
    assert len(longest.outputs[0].token_ids) == 1
    with pytest.raises(ValueError, match="truncate_prompt_tokens=65 is above max_model_len=64"):
        generate(llm, [PROMPT], drawn(truncate_prompt_tokens=65))


def test_no_spaces_are_put_between_special_tokens(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    for spaces in (True, False):
        params = drawn(
            temperature=0,
            skip_special_tokens=False,
            spaces_between_special_tokens=spaces,
            max_tokens=8,
        )
        [output] = generate(llm, [[1, 2, 1]], params)
        ids = output.outputs[0].token_ids
        assert output.outputs[0].text == tokenizer.decode(ids, skip_special_tokens=False)


def test_seeds_do_not_depend_on_the_batch(llm: LLM) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 100, length).tolist() for length in (1, 5, 17, 30)]
    params = [drawn(2, seed=n, top_k=40 if n % 2 else 0, top_p=0.9) for n in range(4)]
    together = generate(llm, prompts, *params)
    for prompt, own, output in reversed(list(zip(prompts, params, together, strict=True))):
        [alone] = generate(llm, [prompt], own)
        assert [s.token_ids for s in alone.outputs] == [s.token_ids for s in output.outputs]
