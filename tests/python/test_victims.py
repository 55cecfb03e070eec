"""Who gives way when pages run out."""

from __future__ import annotations

import numpy as np
import pytest

from nanoflow.offload.cost import CostModel
from nanoflow.offload.host import HostTier
from nanoflow.offload.offload import Offload
from nanoflow.request import Request
from nanoflow.scheduler.pages import PageAllocator
from nanoflow.scheduler.slots import Slots
from nanoflow.scheduler.victims import Victims
from test_policy import Setup, check_output, request

PAGE = 4
PAGE_BYTES = 1000


def preempted_first(*requests: Request) -> str:
    """Of requests that run together until pages run out; all must end with their tokens."""
    setup = Setup(num_slots=4, page_size=PAGE, num_pages=16, max_model_len=60, max_rows=60)
    setup.add(*requests)
    while not (preempted := setup.turn().preempted):
        pass
    victim = setup.state.slots.request(preempted[0]).id
    setup.finish()
    assert requests[0].num_preemptions == 0, "the oldest gets on"
    for item in requests:
        check_output(item)
    return victim


def long_and_short(*prompt_lens: int) -> list[Request]:
    return [
        request(number, prompt_len, 60, ignore_eos=True)
        for number, prompt_len in enumerate(prompt_lens)
    ]


def test_the_cheapest_to_recompute_gives_way_not_the_youngest(blind: None) -> None:
    assert preempted_first(*long_and_short(16, 4, 23)) == "1"
    assert preempted_first(*long_and_short(16, 23, 4)) == "2"


def test_of_equal_ones_the_youngest_gives_way(blind: None) -> None:
    assert preempted_first(*long_and_short(15, 15, 15)) == "2"


def test_priorities_come_before_costs(blind: None) -> None:
    requests = long_and_short(16, 4, 23)
    requests[2].priority = 1
    assert preempted_first(*requests) == "2"


class Cache:
    """Running requests with pages that are granted by hand, above a host pool."""

    def __init__(self) -> None:
        self.slots = Slots(4, 100, PAGE)
        self.pages = PageAllocator(100)
        self.cost = CostModel(PAGE_BYTES, PAGE)
        self.offload = Offload(HostTier(50), self.cost)
        self.victims = Victims(self.slots, self.pages, self.offload)

    def run(self, tokens: int, shared: list[int] | None = None) -> list[int]:
        """A request that has stored so many, of which full pages may be another's."""
        shared = shared or []
        slot = len(self.slots.running)
        own = self.pages.grant(-(-tokens // PAGE) - len(shared)).tolist()
        self.pages.share(shared)
        item = request(slot, tokens, 100)
        item.page_keys = [f"{slot} {n}".encode() for n in range(tokens // PAGE)]
        self.slots.assign(slot, item, slot, [*shared, *own])
        self.slots.computed[slot] = tokens
        self.slots.num_shared[slot] = tokens // PAGE
        return own

    def copy_out(self, slot: int) -> None:
        keys = self.slots.request(slot).page_keys
        for page, key in zip(self.slots.pages_of(slot).tolist(), keys, strict=False):
            assert self.offload.store(page, key)
        _, stores = self.offload.take_moves()
        self.offload.stored(stores, 1e-3)


def test_what_others_hold_is_not_recomputed() -> None:
    cache = Cache()
    first = cache.run(40)
    cache.run(42, shared=first)  # 2 tokens of its own
    cache.run(8)
    assert cache.victims.choose(np.array([1, 2])) == (1, 1)


def test_one_that_frees_nothing_is_the_last_choice() -> None:
    cache = Cache()
    first = cache.run(40)
    cache.run(40, shared=first)
    cache.run(8)
    assert cache.victims.choose(np.array([1, 2])) == (2, 2)
    assert cache.victims.choose(np.array([1])) == (1, 0)


@pytest.mark.parametrize(("tokens_per_load", "victim"), [(1, 1), (3, 2), (5, 2)])
def test_what_the_host_has_costs_a_load(tokens_per_load: float, victim: int) -> None:
    """Ten pages of the host against 20 tokens to be computed; at 5 a page loads do not pay."""
    cache = Cache()
    cache.run(50)
    cache.run(40)
    cache.run(20)
    cache.copy_out(1)
    assert cache.victims.choose(np.array([1, 2]))[0] == 1, "nothing is known of rates"
    cache.cost.observe_step(1000, 0, 1.0)
    loads = cache.offload
    loads.load([0], [99], sought=PAGE, found=PAGE, resumes=False)
    moves, _ = loads.take_moves()
    loads.loaded(moves, tokens_per_load / 1000)
    assert cache.victims.choose(np.array([1, 2]))[0] == victim


def test_a_prompt_that_is_scored_comes_back_with_nothing() -> None:
    cache = Cache()
    cache.run(50)
    cache.run(40)
    cache.run(20)
    cache.copy_out(1)
    item = request(1, 40, 100, prompt_logprobs=1)
    item.page_keys = cache.slots.request(1).page_keys
    cache.slots.requests[1] = item
    assert cache.victims.choose(np.array([1, 2]))[0] == 2
