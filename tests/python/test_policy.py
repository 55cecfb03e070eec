"""Policy and scheduler state, step by step against the fake engine, without a thread."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_engine import FakeEngine, expected_output, make_batch
from nanoflow.request import Request, Sampling
from nanoflow.scheduler.batch import build_batch
from nanoflow.scheduler.deal import Dealer
from nanoflow.scheduler.pages import PageAllocator
from nanoflow.scheduler.policy import Policy, StepPlan
from nanoflow.scheduler.slots import Slots
from nanoflow.scheduler.state import SchedulerState

VOCAB_SIZE = 30
EOS = 7


def sampling(seed: int = 0, **changes: object) -> Sampling:
    fields: dict[str, object] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": seed,
        "min_tokens": 0,
        "stop_token_ids": (),
        "eos_token_ids": (EOS,),
        "ignore_eos": False,
    }
    return Sampling(**(fields | changes))  # type: ignore[arg-type]


def request(number: int, prompt_len: int, max_len: int, **changes: object) -> Request:
    prompt = np.random.default_rng(number).integers(0, VOCAB_SIZE, prompt_len).astype(np.int32)
    return Request(str(number), prompt, sampling(number, **changes), max_len, lambda _: None)


@dataclass
class Setup:
    """An engine and the scheduler's state over it, moved by turn() as the loop does."""

    num_slots: int = 4
    page_size: int = 4
    num_pages: int = 100
    max_model_len: int = 40
    max_rows: int = 16
    cuts: tuple[float, ...] = ()
    steps_in_flight: int = 2
    early: int | None = None  # seed

    def __post_init__(self) -> None:
        self.engine = FakeEngine(
            vocab_size=VOCAB_SIZE,
            num_pages=self.num_pages,
            page_size=self.page_size,
            max_num_batched_tokens=self.max_rows,
            max_num_seqs=self.num_slots,
            max_model_len=self.max_model_len,
            segments=len(self.cuts) + 1,
            early=None if self.early is None else np.random.default_rng(self.early),
        )
        self.state = SchedulerState(
            Policy(Dealer(self.cuts, self.num_slots), self.max_rows),
            Slots(self.num_slots, self.max_model_len, self.page_size),
            PageAllocator(self.num_pages),
        )
        self.in_flight: deque = deque()

    def add(self, *requests: Request) -> None:
        for item in requests:
            self.state.add(item)

    def turn(self) -> StepPlan:
        state = self.state
        state.reclaim(self.engine.completed_steps)
        state.check_integrity()
        step = state.start_step()
        state.check_integrity()
        if not step.plan.is_empty:
            handle = self.engine.submit(make_batch(**build_batch(state.slots, step)))
            assert handle.step == step.number
            self.in_flight.append((step, handle))
        if self.in_flight and (step.plan.is_empty or len(self.in_flight) >= self.steps_in_flight):
            oldest, handle = self.in_flight.popleft()
            state.complete_step(oldest, handle.wait(), 0.0)
            state.check_integrity()
        return step.plan

    def finish(self, turns: int = 10_000) -> None:
        while self.state.has_requests or self.in_flight:
            turns -= 1
            assert turns > 0, "requests do not get on"
            self.turn()
        self.state.reclaim(self.engine.completed_steps)
        self.state.check_integrity()
        assert self.state.pages.num_free == self.num_pages, "pages leaked"
        assert not self.state.open_requests()


def check_output(item: Request) -> None:
    tokens, reason, stop_reason = expected_output(item, VOCAB_SIZE)
    assert (item.output_token_ids, item.finish_reason, item.stop_reason) == (
        tokens,
        reason,
        stop_reason,
    )


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    page_size = draw(st.integers(1, 8))
    max_model_len = draw(st.integers(2, 40))
    num_slots = draw(st.integers(1, 6))
    least_pages = -(-max_model_len // page_size)
    return Setup(
        num_slots=num_slots,
        page_size=page_size,
        num_pages=draw(st.integers(least_pages, 2 * least_pages)),
        max_model_len=max_model_len,
        max_rows=num_slots + draw(st.integers(0, 20)),
        cuts=tuple(sorted(draw(st.sets(st.sampled_from([0.2, 0.25, 0.5, 0.7, 0.9]), max_size=3)))),
        steps_in_flight=draw(st.integers(1, 2)),
        early=draw(st.none() | st.integers(0, 99)),
    )


@st.composite
def requests(draw: st.DrawFn, max_model_len: int) -> list[Request]:
    def one(number: int) -> Request:
        prompt_len = draw(st.integers(1, max_model_len - 1))
        max_tokens = draw(st.integers(1, max_model_len - prompt_len))
        return request(
            number,
            prompt_len,
            prompt_len + max_tokens,
            temperature=draw(st.sampled_from([0.0, 1.0])),
            min_tokens=draw(st.integers(0, max_tokens)),
            stop_token_ids=tuple(draw(st.sets(st.integers(0, 12), max_size=5))),
            ignore_eos=draw(st.booleans()),
        )

    return [one(number) for number in range(draw(st.integers(1, 12)))]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_outputs_do_not_depend_on_the_batching(data: st.DataObject) -> None:
    """Any limits, arrivals, aborts: contexts stay intact, nothing leaks, tokens as expected."""
    setup = data.draw(setups())
    items = data.draw(requests(setup.max_model_len))
    arrivals = sorted(data.draw(st.integers(0, 20)) for _ in items)
    aborts = {
        item.id: data.draw(st.integers(0, 40))
        for item in items
        if data.draw(st.integers(0, 3)) == 0
    }
    for turn in range(41):
        setup.add(*(item for item, at in zip(items, arrivals, strict=True) if at == turn))
        for name in (name for name, at in aborts.items() if at == turn):
            setup.state.end(name, "abort", 0.0)
        setup.turn()
    setup.finish()
    for item in items:
        if item.finish_reason == "abort":
            tokens = expected_output(item, VOCAB_SIZE)[0]
            assert item.output_token_ids == tokens[: len(item.output_token_ids)]
        else:
            check_output(item)


def test_decodes_come_first_and_chunks_fill_the_step_to_the_token() -> None:
    setup = Setup(num_slots=8, max_rows=16)
    setup.add(*(request(n, 12, 30, ignore_eos=True) for n in range(8)))
    rows = []
    for _ in range(6):
        plan = setup.turn()
        assert plan.rows[: plan.decodes].tolist() == [1] * plan.decodes
        assert plan.decodes + plan.prefill_rows == plan.rows.sum()
        rows.append((plan.decodes, plan.prefill_rows))
    assert rows == [(0, 16), (1, 15), (2, 14), (3, 13), (4, 12), (5, 11)]


def test_requests_are_admitted_in_their_order(blind: None) -> None:
    setup = Setup(num_slots=2, num_pages=11, max_rows=100)
    small, large, smaller = request(0, 3, 40), request(1, 38, 40), request(2, 2, 40)
    setup.add(small, large, smaller)
    plan = setup.turn()
    assert [item.id for _, item in plan.admitted] == ["0", "1"]
    setup = Setup(num_slots=3, num_pages=10, max_rows=100)
    setup.add(small, large, smaller)
    plan = setup.turn()  # 1 + 10 pages would be needed; the third must not overtake the second
    assert [item.id for _, item in plan.admitted] == ["0"]


def run_out_of_pages(max_len_of_youngest: int) -> tuple[Setup, list[Request], int]:
    """Until the youngest of three is preempted; also how many of its tokens had arrived then."""
    setup = Setup(num_slots=3, page_size=2, num_pages=20, max_rows=50)
    # The youngest gets its pages a step before the others, who find none left.
    items = [request(n, 10 + n // 2, 40, ignore_eos=True) for n in range(3)]
    items[2].max_len = max_len_of_youngest
    setup.add(*items)
    while True:
        known = len(setup.state.slots.generated(2))
        (in_flight, _) = setup.in_flight[-1] if setup.in_flight else (None, None)
        preempted = setup.turn().preempted
        if preempted:
            assert preempted == [2]
            assert in_flight is not None
            assert 2 in in_flight.plan.slots[in_flight.samples], "its token is not in flight"
            return setup, items, known


def test_out_of_pages_preempts_the_youngest_with_its_token_in_flight(blind: None) -> None:
    setup, items, known = run_out_of_pages(40)
    while not items[2].output_token_ids:  # until it queues again
        assert not setup.turn().admitted
    assert items[2].output_token_ids == expected_output(items[2], VOCAB_SIZE)[0][: known + 1]
    setup.finish()
    assert items[2].num_preemptions > 0 == items[0].num_preemptions
    for item in items:
        check_output(item)


def test_a_token_in_flight_can_end_a_preempted_request(blind: None) -> None:
    _, items, known = run_out_of_pages(40)
    setup, items, _ = run_out_of_pages(11 + known + 1)
    setup.finish()
    assert items[2].num_preemptions == 1
    for item in items:
        check_output(item)
    recomputed = [
        batch.kv_len for batch in setup.engine.batches if 11 in np.diff(batch.request_indptr)
    ]
    assert len(recomputed) == 1, "it prefilled again"


def test_a_request_limited_by_length_has_no_surplus_step() -> None:
    setup = Setup()
    item = request(0, 5, 8, ignore_eos=True)
    setup.add(item)
    setup.finish()
    assert item.finish_reason == "length"
    assert sum(len(batch.tokens) for batch in setup.engine.batches) == 7


def test_the_end_of_sequence_is_seen_one_step_late() -> None:
    setup = Setup()
    item = next(
        item
        for item in (request(n, 5, 40) for n in range(1000))
        if len(expected_output(item, VOCAB_SIZE)[0]) == 4
    )
    setup.add(item)
    setup.finish()
    check_output(item)
    assert len(setup.engine.batches) == 4 + 1


@pytest.mark.parametrize("cuts", [(0.5,), (0.3, 0.5), (0.25, 0.5, 0.75)])
def test_segments_get_their_share_of_rows_and_keys(cuts: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    dealer = Dealer(cuts, 1024)
    shares = np.diff([0, *cuts, 1])
    for count in (1, 2, 7, 100, 1024):
        kv_len = rng.integers(1, 5000, count)
        dealt = dealer.deal_decodes(kv_len)
        rows = np.bincount(dealt, minlength=len(shares))
        keys = np.bincount(dealt, weights=kv_len, minlength=len(shares))
        assert np.all(np.abs(rows - shares * count) <= 1)
        assert np.all(np.abs(keys - shares * kv_len.sum()) <= 2 * kv_len.max())


@pytest.mark.parametrize("cuts", [(0.5,), (0.25, 0.5, 0.75)])
def test_a_full_step_is_dealt_evenly(cuts: tuple[float, ...]) -> None:
    setup = Setup(num_slots=32, num_pages=400, max_rows=64, cuts=cuts)
    setup.add(*(request(n, 30, 40, ignore_eos=True) for n in range(64)))
    for turn in range(20):
        plan = setup.turn()
        assert plan.rows.sum() == 64 or not plan.prefill_rows
        if turn > 3 and plan.prefill_rows:
            starts = np.append(np.cumsum(plan.rows) - plan.rows, plan.rows.sum())
            rows = np.diff(starts[plan.segment_requests])
            assert np.all(np.abs(rows - 64 / (len(cuts) + 1)) <= 1)


def test_a_chunk_larger_than_a_segment_is_cut_only_for_others() -> None:
    alone = Setup(max_rows=32, cuts=(0.5,))
    alone.add(request(0, 39, 40))
    assert alone.turn().rows.tolist() == [32]
    shared = Setup(max_rows=32, cuts=(0.5,))
    shared.add(request(0, 39, 40), request(1, 39, 40))
    assert shared.turn().rows.tolist() == [16, 16]


def test_few_rows_do_not_make_a_segment_longer_than_its_share_of_a_full_step() -> None:
    setup = Setup(max_rows=64, cuts=(0.5,))
    setup.add(*(request(n, length, 40) for n, length in enumerate((31, 30, 10))))
    plan = setup.turn()  # 64 rows would be 31 and 33
    assert (plan.rows.tolist(), plan.segment_requests.tolist()) == ([31, 30, 2], [0, 1, 3])
    assert setup.turn().prefill_rows == 8
    many = Setup(max_rows=64, cuts=(0.5,))
    many.add(*(request(n, length, 40) for n, length in enumerate((20, 15, 39))))
    assert many.turn().rows.tolist() == [20, 15, 29]


def test_a_prompt_alone_is_cut_between_segments_where_most_rows_decode() -> None:
    setup = Setup(num_slots=320, num_pages=6000, max_model_len=300, max_rows=900, cuts=(0.5,))
    setup.add(*(request(n, 1, 60, ignore_eos=True) for n in range(300)))
    while setup.turn().decodes < 300:
        pass
    long = request(300, 280, 300)
    setup.add(long)
    plans = [setup.turn() for _ in range(2)]
    for plan, rows in zip(plans, (140, 140), strict=True):
        assert (plan.decodes, plan.prefill_rows) == (300, rows)
    starts = np.append(np.cumsum(plans[0].rows) - plans[0].rows, plans[0].rows.sum())
    assert sorted(np.diff(starts[plans[0].segment_requests])) == [150, 290]
    setup.finish()
    check_output(long)


def test_cuts_must_ascend() -> None:
    with pytest.raises(ValueError, match="must ascend"):
        Dealer([0.5, 0.5], 4)
