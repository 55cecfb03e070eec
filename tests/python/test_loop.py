"""The scheduler's thread over the fake engine."""

from __future__ import annotations

import gc
import queue
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fake_engine import FakeEngine, FakeHandle, expected_output, make_batch
from nanoflow.errors import EngineError, InvalidLogitsError
from nanoflow.offload.cost import CostModel
from nanoflow.offload.host import HostTier
from nanoflow.offload.offload import Offload
from nanoflow.offload.ssd import SsdTier
from nanoflow.request import Request, Sampling
from nanoflow.scheduler.choose import Chooser
from nanoflow.scheduler.deal import Dealer
from nanoflow.scheduler.loop import SchedulerLoop
from nanoflow.scheduler.pages import PageAllocator
from nanoflow.scheduler.policy import Policy
from nanoflow.scheduler.slots import Slots
from nanoflow.scheduler.state import SchedulerState
from nanoflow.scheduler.stats import StepStats
from nanoflow.scheduler.waiting import WaitingQueue

VOCAB_SIZE = 40
NUM_PAGES = 30
TIMEOUT = 30.0  # seconds until a hanging test fails


@dataclass
class Service:
    """A running loop, with the engine and the state below it and the finished requests."""

    engine: FakeEngine
    state: SchedulerState
    loop: SchedulerLoop
    done: queue.SimpleQueue[Request]

    def request(
        self, number: int, prompt_len: int = 5, max_len: int = 30, **changes: Any
    ) -> Request:
        fields: dict[str, Any] = {
            "temperature": 0.5,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "seed": number,
            "min_tokens": 0,
            "stop_token_ids": (),
            "eos_token_ids": (3,),
            "ignore_eos": False,
        }
        prompt = np.random.default_rng(number).integers(0, VOCAB_SIZE, prompt_len)
        return Request(
            str(number),
            prompt.astype(np.int32),
            Sampling(**(fields | changes)),
            max_len,
            self.done.put,
        )

    def wait(self, count: int) -> dict[str, Request]:
        finished = [self.done.get(timeout=TIMEOUT) for _ in range(count)]
        return {request.id: request for request in finished}


def serve(
    cuts: tuple[float, ...] = (),
    steps_in_flight: int = 2,
    engine_type: type[FakeEngine] = FakeEngine,
    step_listener: Callable[[StepStats], None] | None = None,
    chooser: Chooser | None = None,
    host_slots: int = 0,
    waiting: WaitingQueue | None = None,
    make_ssd: Callable[[NDArray[np.uint8]], SsdTier] | None = None,
    **engine: Any,
) -> Service:
    fake = engine_type(
        host_slots=host_slots,
        vocab_size=VOCAB_SIZE,
        num_pages=NUM_PAGES,
        page_size=4,
        max_num_batched_tokens=16,
        max_num_seqs=6,
        max_model_len=40,
        segments=len(cuts) + 1,
        **engine,
    )
    ssd = None if make_ssd is None else make_ssd(fake.host_pool)
    offload = Offload(HostTier(host_slots), CostModel(64, 4), ssd) if host_slots else None
    state = SchedulerState(
        Policy(Dealer(cuts, 6), 16),
        Slots(6, 40, 4),
        PageAllocator(NUM_PAGES),
        offload=offload,
        waiting=waiting,
    )
    loop = SchedulerLoop(
        fake,
        make_batch,
        state,
        steps_in_flight=steps_in_flight,
        step_listener=step_listener,
        chooser=chooser,
    )
    return Service(fake, state, loop, queue.SimpleQueue())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.001)


def check_nothing_leaked(service: Service) -> None:
    service.loop.close()
    service.state.reclaim(service.engine.completed_steps)
    service.state.check_integrity()
    assert service.state.pages.num_free == NUM_PAGES
    if service.state.offload is not None:
        service.state.offload.check_idle()
    assert not service.state.has_requests


class GatedEngine(FakeEngine):
    """Lets one step complete for each release of `gate`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gate = threading.Semaphore(0)

    def submit(self, batch: Any) -> FakeHandle:
        return GatedHandle(self, super().submit(batch).step)


class GatedHandle(FakeHandle):
    def wait(self) -> Any:
        assert self.engine.gate.acquire(timeout=TIMEOUT)
        return super().wait()


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("cuts", [(), (0.5,)])
def test_all_requests_get_their_tokens(cuts: tuple[float, ...], steps_in_flight: int) -> None:
    service = serve(cuts, steps_in_flight, early=np.random.default_rng(0))
    requests = [service.request(n, 1 + n % 20) for n in range(50)]
    service.loop.submit(requests[:30])
    service.loop.submit(requests[30:])
    service.wait(50)
    for request in requests:
        got = (request.output_token_ids, request.finish_reason, request.stop_reason)
        assert got == expected_output(request, VOCAB_SIZE)
        assert request.arrival_time <= request.first_token_time <= request.finished_time
    check_nothing_leaked(service)


def test_how_fast_the_engine_is_changes_no_batch(blind: None) -> None:
    """Not even when pages are short: requests are preempted at the same steps."""
    runs: list[list[Any]] = []
    for early in (None, 0, 1):
        service = serve((0.5,), early=None if early is None else np.random.default_rng(early))
        requests = [service.request(n, 1 + n % 20) for n in range(60)]
        service.loop.submit(requests)
        service.wait(60)
        assert sum(request.num_preemptions for request in requests) > 0
        check_nothing_leaked(service)
        runs.append(service.engine.batches)
    for run in runs[1:]:
        for batch, expected in zip(run, runs[0], strict=True):
            for name, values in batch.arrays.items():
                np.testing.assert_array_equal(values, expected.arrays[name], name)


def test_two_steps_are_in_flight_while_there_is_work() -> None:
    service = serve(engine_type=GatedEngine)
    service.loop.submit([service.request(0, ignore_eos=True)])
    for step in range(1, 5):
        wait_until(lambda step=step: service.engine.submitted == step + 1)
        assert service.engine.completed_steps == step - 1
        service.engine.gate.release()
    for _ in range(25):
        service.engine.gate.release()
    service.wait(1)
    check_nothing_leaked(service)


def test_equal_prompts_are_separate_requests() -> None:
    service = serve()
    first, second = service.request(1, temperature=0.0), service.request(1, temperature=0.0)
    second.id, second.sampling = "other", service.request(2, temperature=0.0).sampling
    service.loop.submit([first, second])
    service.wait(2)
    assert first.output_token_ids == second.output_token_ids
    check_nothing_leaked(service)


def test_an_id_in_use_fails_alone() -> None:
    service = serve(engine_type=GatedEngine)
    first, second = service.request(1), service.request(1)
    service.loop.submit([first, second])
    assert service.done.get(timeout=TIMEOUT) is second
    assert second.finish_reason == "error"
    assert "'1' is in use" in str(second.error)
    for _ in range(40):
        service.engine.gate.release()
    assert service.done.get(timeout=TIMEOUT) is first
    assert first.finish_reason in ("stop", "length")
    check_nothing_leaked(service)


def test_aborts_at_any_moment_leak_nothing() -> None:
    rng = np.random.default_rng(1)
    service = serve(early=rng)
    requests = [service.request(n, int(rng.integers(1, 30)), 39) for n in range(60)]
    for request in requests:
        service.loop.submit([request])
        if rng.random() < 0.5:
            service.loop.abort([str(rng.integers(0, 60))])
        if rng.random() < 0.2:
            time.sleep(0.002)
    service.loop.abort([request.id for request in requests[40:]])
    service.wait(60)
    for request in requests:
        expected, reason, _ = expected_output(request, VOCAB_SIZE)
        if request.finish_reason == "abort":
            assert request.output_token_ids == expected[: len(request.output_token_ids)]
        else:
            assert (request.output_token_ids, request.finish_reason) == (expected, reason)
    assert {request.finish_reason for request in requests} >= {"abort"}
    check_nothing_leaked(service)


def test_all_may_be_aborted_at_once() -> None:
    service = serve(engine_type=GatedEngine)
    requests = [service.request(n, ignore_eos=True) for n in range(20)]
    service.loop.submit(requests)
    wait_until(lambda: service.engine.submitted == 2)
    later = service.request(20)
    service.loop.abort_all()
    service.loop.submit([later])
    for _ in range(4):
        service.engine.gate.release()
    service.wait(20)
    assert {request.finish_reason for request in requests} == {"abort"}
    for _ in range(40):
        service.engine.gate.release()
    service.wait(1)
    assert later.finish_reason in ("stop", "length")
    service.loop.abort_all()  # nobody
    service.loop.submit([another := service.request(21)])
    for _ in range(40):
        service.engine.gate.release()
    service.wait(1)
    assert another.finish_reason in ("stop", "length")
    check_nothing_leaked(service)


def test_logits_that_are_no_numbers_fail_their_request_alone() -> None:
    service = serve(invalid_seeds=frozenset({2}))
    requests = [service.request(n) for n in range(5)]
    service.loop.submit(requests)
    service.wait(5)
    for request in requests:
        if request.id == "2":
            assert isinstance(request.error, InvalidLogitsError)
            assert "request 2: the logits after 0 generated tokens hold NaN" in str(request.error)
        else:
            assert request.output_token_ids == expected_output(request, VOCAB_SIZE)[0]
    check_nothing_leaked(service)


@dataclass
class CountingWatcher:
    """Finds a stop string in the third token."""

    count: int = 0

    def push(self, token: int) -> str | None:
        self.count += 1
        return "third" if self.count == 3 else None


def test_a_stop_string_ends_its_request() -> None:
    service = serve()
    requests = [service.request(n, ignore_eos=True) for n in range(4)]
    requests[1].stop_watcher = CountingWatcher()
    service.loop.submit(requests)
    service.wait(4)
    for request in requests:
        expected, *end = expected_output(request, VOCAB_SIZE)
        if request.id == "1":
            expected, end = expected[:3], ["stop", "third"]
        assert request.output_token_ids == expected
        assert [request.finish_reason, request.stop_reason] == end
    check_nothing_leaked(service)


def test_close_aborts_what_is_open() -> None:
    service = serve(engine_type=GatedEngine)
    requests = [service.request(n, ignore_eos=True) for n in range(10)]
    service.loop.submit(requests)
    for _ in range(3):
        service.engine.gate.release()
    wait_until(lambda: service.engine.completed_steps == 3)
    closing = threading.Thread(target=service.loop.close)
    closing.start()
    while closing.is_alive():
        service.engine.gate.release()
        closing.join(0.001)
    check_nothing_leaked(service)
    assert {request.finish_reason for request in service.wait(10).values()} == {"abort"}
    with pytest.raises(EngineError, match="has been closed"):
        service.loop.submit([service.request(99)])


def test_the_engine_is_let_go_when_the_loop_is_closed() -> None:
    service = serve()
    service.loop.submit([service.request(0)])
    service.wait(1)
    engine = weakref.ref(service.engine)
    service.loop.close()
    del service.engine
    gc.collect()
    assert engine() is None


def test_the_listener_hears_of_every_step() -> None:
    heard: list[StepStats] = []
    service = serve(step_listener=heard.append)
    requests = [service.request(n, 7, 12, ignore_eos=True) for n in range(9)]
    service.loop.submit(requests)
    service.wait(9)
    service.loop.close()
    assert [stats.step for stats in heard] == list(range(1, service.engine.submitted + 1))
    assert sum(stats.prefill_tokens for stats in heard) == 9 * 7
    assert sum(stats.decode_tokens for stats in heard) == 9 * 4  # each prefill gives a token, too
    assert sum(stats.output_tokens for stats in heard) == 9 * 5
    assert max(stats.running for stats in heard) == 6
    assert heard[0].waiting == 9 - heard[0].running
    assert heard[-1].running == heard[-1].waiting == 0
    assert all(stats.scheduler_seconds > 0 for stats in heard)


def test_an_idle_thread_sleeps() -> None:
    service = serve()
    service.loop.submit([service.request(0)])
    service.wait(1)
    time.sleep(0.05)  # the surplus step
    begin = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - begin < 0.05
    check_nothing_leaked(service)
