"""Requests with a lower priority go first, and nothing else changes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow import LLM, AsyncLLM, SamplingParams
from nanoflow.request import Request
from nanoflow.scheduler.waiting import WaitingQueue
from test_policy import Setup, check_output, request
from tiny_models import write_tiny_llama


def urgent(number: int, priority: int, prompt_len: int = 5, max_len: int = 12) -> Request:
    made = request(number, prompt_len, max_len, ignore_eos=True)
    made.priority = priority
    return made


def order_of_ends(setup: Setup, requests: list[Request]) -> list[str]:
    ended: list[str] = []
    for one in requests:
        one.on_finish = lambda request: ended.append(request.id)
    setup.add(*requests)
    setup.finish()
    return ended


def test_lower_priorities_first_then_the_order_of_arrival() -> None:
    requests = [urgent(n, priority) for n, priority in enumerate([1, 0, -3, 1, 0, 7, -3])]
    ended = order_of_ends(Setup(num_slots=1), requests)
    assert ended == ["2", "6", "1", "4", "0", "3", "5"]
    for one in requests:
        check_output(one)


@given(priorities=st.lists(st.integers(0, 2), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_a_request_goes_back_to_its_place_in_the_queue(priorities: list[int], seed: int) -> None:
    requests = [urgent(n, priority) for n, priority in enumerate(priorities)]
    age_of = {one.id: (one.priority << 32) + n for n, one in enumerate(requests)}
    waiting = WaitingQueue()
    for one in requests:
        waiting.add(one)
    in_order = [one.id for one in waiting]
    rng = np.random.default_rng(seed)
    out = rng.permutation(in_order)[: rng.integers(1, len(in_order) + 1)].tolist()
    taken = [waiting.pop(name) for name in out]
    for one in taken:
        assert one is not None
        waiting.put_back(one, age_of)
    assert [one.id for one in waiting] == in_order


def test_a_late_request_of_low_priority_overtakes_the_queue() -> None:
    setup = Setup(num_slots=2)
    ended: list[str] = []
    early = [urgent(n, 5, max_len=30) for n in range(5)]
    late = urgent(9, -5, max_len=30)
    for one in (*early, late):
        one.on_finish = lambda request: ended.append(request.id)
    setup.add(*early)
    for _ in range(3):
        setup.turn()
    setup.add(late)
    setup.finish()
    assert ended == ["0", "1", "9", "2", "3", "4"]
    for one in (*early, late):
        check_output(one)


def test_who_gives_way_has_the_highest_priority(blind: None) -> None:
    setup = Setup(num_slots=3, num_pages=12)
    first, second = urgent(0, 4, 10, 40), urgent(1, 2, 10, 40)
    setup.add(first, second)
    for _ in range(4):
        setup.turn()
    setup.add(third := urgent(2, 3, 10, 40))
    setup.finish()
    assert second.num_preemptions == 0 < first.num_preemptions
    for one in (first, second, third):
        check_output(one)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(1, 20), st.integers(1, 15)), max_size=25),
    st.integers(10, 30),
    st.integers(0, 3),
)
def test_all_end_with_their_tokens(
    arrivals: list[tuple[int, int, int]], num_pages: int, turns: int
) -> None:
    setup = Setup(num_pages=num_pages, cuts=(0.5,), early=turns)
    requests = []
    for number, (priority, prompt_len, output_len) in enumerate(arrivals):
        requests.append(urgent(number, priority, prompt_len, prompt_len + output_len))
        setup.add(requests[-1])
        for _ in range(turns):
            setup.turn()
    setup.finish()
    for one in requests:
        check_output(one)


def test_priorities_need_their_policy(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path, tokenizer=True)
    sizes: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 1, "device": "cpu"}
    params = SamplingParams(temperature=0, max_tokens=3)
    with LLM(model, scheduling_policy="priority", **sizes) as llm:
        outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False, priority=[2, 1, 0])
        ends = [output.metrics.finished_time for output in outputs if output.metrics]
        assert ends == sorted(ends, reverse=True)
        with pytest.raises(ValueError, match="there are 2 prompts but 1 priorities"):
            llm.generate(["a", "b"], params, priority=[1])
        with pytest.raises(TypeError, match="priority='high' must be an integer"):
            llm.generate("a", params, priority=["high"])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="must be from -2147483648 to 2147483647"):
            llm.generate("a", params, priority=[2**31])
    engine = AsyncLLM(model, **sizes)

    async def fail() -> None:
        with pytest.raises(ValueError, match="priority=1 needs scheduling_policy='priority'"):
            await anext(engine.generate("a", params, "x", priority=1))

    asyncio.run(fail())
    engine.shutdown()
    with pytest.raises(ValueError, match="scheduling_policy='lpm' is not supported yet"):
        LLM(model, scheduling_policy="lpm")
