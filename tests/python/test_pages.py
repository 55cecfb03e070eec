"""PageAllocator against a model of plain sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.scheduler.pages import PageAllocator


@given(
    num_pages=st.integers(1, 20),
    actions=st.lists(st.tuples(st.sampled_from(["grant", "retire", "reclaim"]), st.integers(0, 9))),
)
def test_every_page_is_in_one_place(num_pages: int, actions: list[tuple[str, int]]) -> None:
    allocator = PageAllocator(num_pages)
    granted: list[np.ndarray] = []
    retired: list[tuple[int, set[int]]] = []
    step = 0
    for action, number in actions:
        if action == "grant" and number <= allocator.num_free:
            pages = allocator.grant(number)
            assert len(set(pages.tolist())) == number
            granted.append(pages)
        elif action == "grant":
            with pytest.raises(ValueError, match=f"cannot grant {number} pages"):
                allocator.grant(number)
        elif action == "retire" and granted:
            pages = granted.pop(number % len(granted))
            allocator.retire(pages, step + number % 3)
            retired.append((step + number % 3, set(pages.tolist())))
        elif action == "reclaim":
            step += 1
            allocator.reclaim(step)
            retired = [(last, pages) for last, pages in retired if last > step]
        allocator.check_integrity()
        held = {page for pages in granted for page in pages.tolist()}
        leaving = {page for _, pages in retired for page in pages}
        assert set(np.flatnonzero(allocator.users()).tolist()) == held
        assert allocator.num_retired == len(leaving)
        assert allocator.num_free == num_pages - len(held) - len(leaving)


def test_pages_come_back_only_after_the_last_step_that_uses_them() -> None:
    allocator = PageAllocator(2)
    pages = allocator.grant(2)
    allocator.retire(pages, step=5)
    allocator.reclaim(4)
    assert allocator.num_free == 0
    allocator.reclaim(5)
    assert sorted(allocator.grant(2).tolist()) == [0, 1]


def test_a_page_cannot_be_retired_twice() -> None:
    allocator = PageAllocator(3)
    pages = allocator.grant(1)
    allocator.retire(pages, step=1)
    with pytest.raises(ValueError, match="not granted"):
        allocator.retire(pages, step=1)


def test_a_cache_has_a_page() -> None:
    with pytest.raises(ValueError, match="num_pages=0"):
        PageAllocator(0)
