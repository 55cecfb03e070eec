"""Pages that are copied to the host and come back, over the fake engine, which checks contents."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_engine import expected_output
from nanoflow.offload import cost as cost_module
from nanoflow.offload.cost import CostModel, Rate
from nanoflow.offload.host import HostTier
from nanoflow.offload.stats import Transfer
from nanoflow.request import Request
from test_loop import VOCAB_SIZE, Service, check_nothing_leaked, serve

PAGE = 4


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading pays always: the fake engine's times mean nothing."""
    monkeypatch.setattr(CostModel, "is_worth", lambda *arguments: True)


def check_outputs(requests: list[Request]) -> None:
    for request in requests:
        got = (request.output_token_ids, request.finish_reason, request.stop_reason)
        assert got == expected_output(request, VOCAB_SIZE)


def follow_up(service: Service, number: int, before: Request, more: int) -> Request:
    """The next round of a conversation: all of the one before and a few tokens."""
    request = service.request(number, more)
    said = np.array(before.output_token_ids, np.int32)
    request.prompt_token_ids = np.concatenate(
        [before.prompt_token_ids, said, request.prompt_token_ids]
    )
    return request


def flush_device(service: Service, number: int) -> None:
    """Requests that take every page of the device."""
    requests = [service.request(number + n, 38, 40) for n in range(6)]
    service.loop.submit(requests)
    service.wait(6)


@pytest.mark.parametrize("cuts", [(), (0.5,)])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_a_second_round_is_loaded_from_the_host(
    cuts: tuple[float, ...], steps_in_flight: int
) -> None:
    service = serve(cuts, steps_in_flight, host_slots=100, early=np.random.default_rng(1))
    first = service.request(1, 17, 24, ignore_eos=True)
    service.loop.submit([first])
    service.wait(1)
    flush_device(service, 10)
    second = follow_up(service, 2, first, 3)
    service.loop.submit([second])
    service.wait(1)
    check_nothing_leaked(service)
    check_outputs([first, second])
    # 17 + 7 tokens; the keys of the last two are told by no later step.
    assert second.num_cached_tokens == 20
    assert service.state.offload is not None
    stats = service.state.offload.stats()
    assert stats.hits["host"] == 20 and stats.queries > 20
    assert stats.traffic[Transfer.LOAD].bytes == 5 * 64
    assert stats.traffic[Transfer.STORE].bytes >= (5 + 6 * 9) * 64
    assert stats.traffic[Transfer.LOAD].seconds > 0


def test_preempted_requests_come_back_from_the_host(blind: None) -> None:
    """All that is recomputed is what fills no page, or has not been known long enough."""
    rows: dict[int, int] = {}
    for host_slots in (0, 200):
        service = serve((0.5,), host_slots=host_slots)
        prefilled: list[int] = []
        service.loop.step_listener = lambda stats, seen=prefilled: seen.append(stats.prefill_tokens)
        requests = [service.request(n, 1 + n % 20, ignore_eos=True) for n in range(60)]
        service.loop.submit(requests)
        service.wait(60)
        check_nothing_leaked(service)
        check_outputs(requests)
        assert sum(request.num_preemptions for request in requests) > 10
        rows[host_slots] = sum(prefilled) - sum(len(r.prompt_token_ids) for r in requests)
    offload = service.state.offload
    assert offload is not None and offload.stats().resumed > 0
    assert rows[200] < rows[0] / 2


def run_turns(service: Service, rng: np.random.Generator) -> None:
    """Conversations that share beginnings, aborts, and a reset in between; checks all outputs."""
    shared = service.request(0, 20).prompt_token_ids
    known: list[Request] = []
    for turn in range(6):
        requests = []
        for n in range(10):
            request = service.request(100 * turn + n, 1 + n)
            if n % 3:
                request.prompt_token_ids = np.concatenate(
                    [shared[: 4 * n % 20], request.prompt_token_ids]
                )
            elif known and len(known[n].output_token_ids) + len(known[n].prompt_token_ids) < 25:
                request = follow_up(service, 100 * turn + n, known[n], 2)
            requests.append(request)
        service.loop.submit(requests)
        aborted = [str(100 * turn + n) for n in rng.integers(0, 10, 2).tolist()]
        service.loop.abort(aborted)
        if turn == 3:
            service.loop.forget_prefixes()
        service.wait(10)
        known = requests
        check_outputs([request for request in requests if request.finish_reason != "abort"])
    check_nothing_leaked(service)


@pytest.mark.parametrize("host_slots", [1, 3, 40])
def test_a_small_host_pool_gives_right_tokens(host_slots: int, blind: None) -> None:
    rng = np.random.default_rng(host_slots)
    run_turns(serve((0.5,), host_slots=host_slots, early=rng), rng)


def test_how_fast_copies_are_changes_no_batch(blind: None) -> None:
    runs: list[list[Any]] = []
    for early in (None, 0):
        rng = None if early is None else np.random.default_rng(early)
        service = serve((0.5,), host_slots=30, early=rng)
        service.loop.submit([service.request(n, 1 + n % 20) for n in range(40)])
        service.wait(40)
        check_nothing_leaked(service)
        runs.append([batch.arrays for batch in service.engine.batches])
    for one, other in zip(*runs, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=60), st.integers(1, 5))
def test_a_slot_is_one_thing_at_a_time(actions: list[tuple[int, int]], num_slots: int) -> None:
    tier = HostTier(num_slots)
    arriving: dict[int, bytes] = {}
    pinned: list[int] = []
    for action, number in actions:
        key = bytes([number])
        if action <= 1:
            slot = tier.reserve(key)
            if slot is not None:
                assert slot not in arriving and slot not in pinned
                arriving[slot] = key
        elif action == 2 and arriving:
            slot, _ = arriving.popitem()
            tier.settle([slot])
        elif action == 3 and arriving:
            slot, _ = arriving.popitem()
            tier.drop([slot])
        elif action == 4:
            found = tier.find([key])
            tier.pin(found)
            pinned += found
        elif action == 5 and pinned:
            tier.unpin([pinned.pop()])
        elif action == 6 and number == 0:
            tier.forget()
        tier.check_integrity()
    tier.settle(list(arriving))
    tier.unpin(pinned)
    tier.forget()
    tier.check_integrity()
    assert tier.num_used == tier.num_pinned() == 0


def test_the_least_recently_used_content_goes_first() -> None:
    tier = HostTier(3)
    for key in (b"a", b"b", b"c"):
        slot = tier.reserve(key)
        assert slot is not None
        tier.settle([slot])
    tier.touch([b"a", b"x"])
    tier.pin(tier.find([b"b"]))
    assert tier.reserve(b"a") is None  # it is here
    assert tier.reserve(b"d") is not None
    assert b"c" not in tier and b"b" in tier and tier.find([b"d"]) == []
    assert tier.reserve(b"e") is not None
    assert b"a" not in tier
    assert tier.reserve(b"f") is None  # the one slot left is being read


def test_the_end_of_a_conversation_goes_before_its_beginning() -> None:
    """A page is of no use without those before it."""
    service = serve(host_slots=9)
    first = service.request(1, 20, 32, ignore_eos=True)  # 8 pages
    service.loop.submit([first])
    service.wait(1)
    service.loop.submit([service.request(2, 12, 13)])  # takes 3 slots, of which 1 is free
    service.wait(1)
    check_nothing_leaked(service)
    assert service.state.offload is not None
    assert len(service.state.offload.find(first.page_keys)) >= 5


def test_loading_is_compared_with_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cost = CostModel(page_bytes=1000, page_size=10)
    bandwidth = Rate()
    assert cost.is_worth(5, bandwidth)
    bandwidth.observe(1e6, 1.0)  # 1000 pages a second
    assert cost.is_worth(5, bandwidth)
    cost.observe_step(10, 500, 0.001)  # says nothing of prompts
    cost.observe_step(1000, 0, 0.5)  # 2000 tokens, 200 pages a second
    assert cost.is_worth(5, bandwidth) and not cost.is_worth(5, bandwidth, backlog=21)
    assert cost.is_worth(5, bandwidth, backlog=20)
    for _ in range(20):
        cost.observe_step(1000, 0, 0.05)
    assert not cost.is_worth(5, bandwidth)
    now = time.perf_counter()
    monkeypatch.setattr(cost_module, "perf_counter", lambda: now + 29)
    assert not cost.is_worth(5, bandwidth)
    monkeypatch.setattr(cost_module, "perf_counter", lambda: now + 31)
    assert cost.is_worth(5, bandwidth), "a try, after so long"
    bandwidth.observe(1e6, 1.0)
    assert not cost.is_worth(5, bandwidth)


def test_what_does_not_pay_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CostModel, "is_worth", lambda *arguments: False)
    service = serve(host_slots=30)
    requests = [service.request(n, 20) for n in range(10)]
    service.loop.submit(requests)
    service.wait(10)
    check_nothing_leaked(service)
    assert service.state.offload is not None
    stats = service.state.offload.stats()
    assert stats.usage == {"host": 0.0}
    assert all(traffic.bytes == 0 for traffic in stats.traffic.values())
