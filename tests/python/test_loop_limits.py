"""The scheduler's thread with a bounded queue, and requests that may take only so long."""

from __future__ import annotations

import time

from fake_engine import expected_output
from nanoflow.errors import QueueFullError
from nanoflow.scheduler.waiting import WaitingQueue
from test_loop import VOCAB_SIZE, GatedEngine, check_nothing_leaked, serve, wait_until


def test_requests_beyond_the_limits_of_the_queue_are_rejected_alone() -> None:
    service = serve(waiting=WaitingQueue(4, 30))
    requests = [service.request(n) for n in range(7)]
    service.loop.submit(requests)
    service.wait(7)
    for request in requests[:4]:
        assert request.output_token_ids == expected_output(request, VOCAB_SIZE)[0]
    for request in requests[4:]:
        assert isinstance(request.error, QueueFullError)
        assert request.finish_reason == "error" and not request.output_token_ids
    expected = "request 4: the queue is full: 4 reqs wait and max_num_queued_reqs=4; try again"
    assert expected in str(requests[4].error)
    long = [service.request(10, 16), service.request(11, 15), service.request(12, 14)]
    service.loop.submit(long)
    service.wait(3)
    assert [request.error is None for request in long] == [True, False, True]
    assert "16 tokens wait and max_num_queued_tokens=30" in str(long[1].error)
    service.loop.submit([alone := service.request(13, 35, 39)])  # beyond the limit by itself
    service.wait(1)
    assert alone.error is None
    assert dict(service.state.stats().rejected) == {"reqs": 3, "tokens": 1}
    check_nothing_leaked(service)


def test_requests_that_take_too_long_end_with_what_there_is() -> None:
    service = serve(engine_type=GatedEngine)
    requests = [service.request(n, ignore_eos=True) for n in range(9)]  # of which six run
    for request in (requests[1], requests[7]):
        request.timeout = 0.05
    service.loop.submit(requests)
    for _ in range(4):
        service.engine.gate.release()
    wait_until(lambda: service.engine.completed_steps == 4)
    time.sleep(0.05)
    for _ in range(200):
        service.engine.gate.release()
    service.wait(9)
    for request in requests:
        expected, reason, _ = expected_output(request, VOCAB_SIZE)
        if request in (requests[1], requests[7]):
            assert (request.finish_reason, request.stop_reason) == ("abort", "timeout")
            assert request.output_token_ids == expected[: len(request.output_token_ids)]
            assert len(request.output_token_ids) < len(expected)
        else:
            assert (request.output_token_ids, request.finish_reason) == (expected, reason)
    assert len(requests[1].output_token_ids) > 0 == len(requests[7].output_token_ids)
    check_nothing_leaked(service)


def test_a_timeout_that_is_not_reached_changes_nothing() -> None:
    service = serve()
    requests = [service.request(n) for n in range(20)]
    for request in requests:
        request.timeout = 600.0
    service.loop.submit(requests)
    service.wait(20)
    assert all(r.finish_reason in ("stop", "length") for r in requests)
    check_nothing_leaked(service)
