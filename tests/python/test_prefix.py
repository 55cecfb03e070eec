"""Requests that begin alike share pages: the allocator alone, the scheduler, and a whole LLM."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow import LLM, SamplingParams
from nanoflow.request import Request
from nanoflow.scheduler.pages import PageAllocator
from nanoflow.scheduler.prefix import page_keys
from test_policy import VOCAB_SIZE, Setup, check_output, request, setups
from tiny_models import write_tiny_llama


def key(number: int) -> bytes:
    return number.to_bytes(4, "little")


def test_keys_tell_all_tokens_up_to_the_end_of_a_page() -> None:
    tokens = np.arange(10, dtype=np.int32)
    keys = list(page_keys(tokens, 4))
    assert len(keys) == 2
    assert list(page_keys(tokens[4:], 4, keys[0])) == keys[1:]
    changed = tokens.copy()
    changed[0] = 99
    assert not set(keys) & set(page_keys(changed, 4)), "the second page follows another first"


def test_pages_are_found_until_they_are_granted_anew_the_oldest_first() -> None:
    pages = PageAllocator(4)
    granted = pages.grant(3)
    for number, page in enumerate(granted.tolist()):
        pages.register(page, key(number))
    pages.retire(granted, 1)
    assert pages.find(map(key, range(3))) == granted.tolist(), "retired pages are found"
    pages.reclaim(1)
    assert pages.num_free == 4
    assert pages.find(map(key, range(5))) == granted.tolist()
    pages.grant(2)  # the blank one, then the last page of the beginning
    assert pages.find(map(key, range(3))) == granted[:2].tolist()
    pages.share(granted[:1].tolist())  # now the most recently wanted
    pages.retire(granted[:1], 2)
    pages.reclaim(2)
    pages.grant(1)
    assert pages.find(map(key, range(3))) == granted[:1].tolist()
    pages.forget()
    assert pages.find([key(0)]) == []
    assert pages.num_free == 1
    pages.check_integrity()


def test_a_shared_page_comes_back_after_the_last_step_of_all_who_had_it() -> None:
    pages = PageAllocator(1)
    granted = pages.grant(1)
    pages.register(int(granted[0]), key(0))
    pages.share(granted.tolist())
    pages.retire(granted, 7)
    pages.check_integrity()
    assert pages.num_held(granted.tolist()) == 1
    pages.retire(granted, 5)
    pages.reclaim(6)
    assert pages.num_free == 0
    pages.share(granted.tolist())  # while it is on its way back
    pages.reclaim(7)
    pages.check_integrity()
    assert pages.num_free == pages.num_retired == 0
    pages.retire(granted, 9)
    pages.reclaim(9)
    assert pages.num_free == 1


@given(
    actions=st.lists(
        st.tuples(st.sampled_from(["grant", "find", "retire", "reclaim"]), st.integers(0, 9))
    )
)
def test_every_page_is_in_one_place(actions: list[tuple[str, int]]) -> None:
    pages = PageAllocator(6)
    held: list[list[int]] = []
    step = 0
    for action, number in actions:
        if action == "grant" and pages.num_free:
            held.append(pages.grant(1 + number % pages.num_free).tolist())
            for place, page in enumerate(held[-1]):
                pages.register(page, key(number + place))
        elif action == "find" and (found := pages.find(key(number + i) for i in range(3))):
            pages.share(found)
            held.append(found)
        elif action == "retire" and held:
            pages.retire(np.array(held.pop(number % len(held)), np.int32), step + number % 3)
        elif action == "reclaim":
            step += 1
            pages.reclaim(step)
        pages.check_integrity()
        counts = np.bincount(np.array(list(chain(*held)), np.int64), minlength=6)
        assert np.array_equal(counts, pages.users())


def alike(number: int, shared: int, own: int, max_len: int, **changes: object) -> Request:
    """A request whose first `shared` tokens are those of all others."""
    item = request(number, shared + own, max_len, **changes)
    item.prompt_token_ids[:shared] = np.arange(shared) % VOCAB_SIZE
    return item


def test_a_prompt_is_computed_once_and_its_last_token_always() -> None:
    setup = Setup(page_size=4, max_rows=64)
    setup.add(alike(0, 16, 0, 20, ignore_eos=True))
    setup.finish()
    again, longer = alike(1, 16, 0, 20, ignore_eos=True), alike(2, 16, 3, 24, ignore_eos=True)
    setup.add(again, longer)
    assert setup.turn().rows.tolist() == [4, 3], "a whole page is computed again for one token"
    setup.finish()
    assert (again.num_cached_tokens, longer.num_cached_tokens) == (12, 16)
    for item in (again, longer):
        check_output(item)


def test_what_was_generated_is_found_too() -> None:
    setup = Setup(page_size=4, max_rows=64)
    first = request(0, 5, 24, ignore_eos=True)
    setup.add(first)
    setup.finish()
    history = np.array([*first.prompt_token_ids, *first.output_token_ids, 1, 2], np.int32)
    second = request(1, len(history), 40, ignore_eos=True)
    second.prompt_token_ids[:] = history
    setup.add(second)
    setup.finish()
    assert second.num_cached_tokens == 20, "the last token of a request is never stored"
    check_output(second)


def test_a_preempted_request_finds_its_own_pages(blind: None) -> None:
    setup = Setup(num_slots=3, page_size=2, num_pages=45, max_rows=50)
    items = [request(n, 10, 40, ignore_eos=True) for n in range(3)]
    items[0].max_len = items[1].max_len = 36
    setup.add(*items)
    prefilled = []
    while setup.state.has_requests:
        plan = setup.turn()
        prefilled += [plan.prefill_rows] if plan.admitted else []
    setup.finish()
    assert items[2].num_preemptions == 1
    assert prefilled[0] == 30
    assert len(prefilled) == 2 and prefilled[1] < 30, prefilled
    check_output(items[2])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_sharing_changes_no_output(data: st.DataObject) -> None:
    """Equal beginnings, any limits, arrivals, aborts and preemptions: tokens as without sharing."""
    setup = data.draw(setups())
    items = []
    for number in range(data.draw(st.integers(1, 12))):
        length = data.draw(st.integers(1, setup.max_model_len - 1))
        shared = data.draw(st.integers(0, length))
        max_len = data.draw(st.integers(length + 1, setup.max_model_len))
        items.append(alike(number, shared, length - shared, max_len))
    arrivals = sorted(data.draw(st.integers(0, 30)) for _ in items)
    aborted = data.draw(st.sets(st.sampled_from([item.id for item in items]), max_size=2))
    for turn in range(31):
        setup.add(*(item for item, at in zip(items, arrivals, strict=True) if at == turn))
        if turn == 25:
            for name in sorted(aborted):
                setup.state.end(name, "abort", 0.0)
        setup.turn()
    setup.finish()
    for item in items:
        if item.finish_reason != "abort":
            check_output(item)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("is_on", [True, False])
def test_an_llm_reuses_a_conversation(model: Path, is_on: bool) -> None:
    prompt = {"prompt_token_ids": [1 + i % 50 for i in range(40)]}
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    switch = {} if is_on else {"enable_prefix_caching": False}
    with LLM(model, block_size=8, skip_tokenizer_init=True, **switch) as llm:
        first = llm.generate(prompt, params, use_tqdm=False)[0]
        second = llm.generate(prompt, params, use_tqdm=False)[0]
        assert first.outputs[0].token_ids == second.outputs[0].token_ids
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32 if is_on else 0)
        assert llm.reset_prefix_cache()
        assert llm.generate(prompt, params, use_tqdm=False)[0].num_cached_tokens == 0
