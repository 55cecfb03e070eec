"""The scheduler's thread when the engine, or one request, fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fake_engine import expected_output
from nanoflow.errors import EngineError, StepError, TextError
from test_loop import VOCAB_SIZE, check_nothing_leaked, serve


@pytest.mark.parametrize("early", [None, 0, 1])
def test_an_engine_failure_fails_those_that_run_and_spares_those_that_wait(
    early: int | None,
) -> None:
    rng = None if early is None else np.random.default_rng(early)
    service = serve(fail_at=(4,), early=rng)
    requests = [service.request(n, ignore_eos=True) for n in range(20)]
    service.loop.submit(requests)
    service.wait(20)
    failed = [request for request in requests if request.finish_reason == "error"]
    assert 0 < len(failed) <= 6, "slots"
    for request in failed:
        assert isinstance(request.error, StepError)
        assert str(request.error.__cause__) == "planted failure"
    for request in requests:
        if request not in failed:
            assert request.output_token_ids == expected_output(request, VOCAB_SIZE)[0]
    assert service.engine.restarts == 1
    service.loop.submit([later := service.request(99)])
    service.wait(1)
    assert later.finish_reason in ("stop", "length")
    check_nothing_leaked(service)


def test_preempted_requests_outlive_an_engine_failure(blind: None) -> None:
    service = serve(fail_at=(31,))
    requests = [service.request(n, 1 + n % 20, 39, ignore_eos=True) for n in range(12)]
    service.loop.submit(requests)
    service.wait(12)
    failed = [request for request in requests if request.finish_reason == "error"]
    assert len(failed) < 6
    assert any(request.num_preemptions for request in requests if request not in failed)
    for request in requests:
        if request not in failed:
            assert request.output_token_ids == expected_output(request, VOCAB_SIZE)[0]
    check_nothing_leaked(service)


@pytest.mark.parametrize("fail_at", [4, 5, 11, 12, 20, 27])
def test_copies_outlive_an_engine_failure(fail_at: int) -> None:
    service = serve(fail_at=(fail_at,), host_slots=12)
    requests = [service.request(n % 9, 1 + n % 9 * 3, 39, ignore_eos=True) for n in range(27)]
    for n, request in enumerate(requests):
        request.id = str(n)
        request.sampling = replace(request.sampling, seed=n, temperature=0.0)
    service.loop.submit(requests)
    service.wait(27)
    for request in requests:
        if request.finish_reason != "error":
            assert request.output_token_ids == expected_output(request, VOCAB_SIZE)[0]
    assert service.engine.restarts == 1
    check_nothing_leaked(service)
    service.state.offload.check_idle()


@pytest.mark.parametrize("restart_fails", [False, True])
def test_an_engine_that_fails_again_is_given_up(restart_fails: bool) -> None:
    service = serve(fail_at=(4, 9), restart_fails=restart_fails)
    requests = [service.request(n, ignore_eos=True) for n in range(20)]
    service.loop.submit(requests)
    service.wait(20)
    assert {request.finish_reason for request in requests} == {"error"}
    cause = "planted failure of the restart" if restart_fails else "planted failure"
    closed = [request for request in requests if not isinstance(request.error, StepError)]
    assert len(closed) >= 8
    for request in closed:
        assert isinstance(request.error, EngineError)
        assert str(request.error.__cause__) == cause
    with pytest.raises(EngineError, match=f"has failed and is closed: {cause}"):
        service.loop.submit([service.request(99)])
    assert service.engine.restarts == 1
    service.loop.close()


class FailingWatcher:
    def push(self, token: int) -> str | None:
        raise UnicodeError("planted")


def test_a_watcher_that_fails_fails_its_request_alone() -> None:
    service = serve()
    requests = [service.request(n, ignore_eos=True) for n in range(4)]
    requests[1].stop_watcher = FailingWatcher()
    service.loop.submit(requests)
    service.wait(4)
    assert isinstance(requests[1].error, TextError)
    assert "request 1: its tokens cannot be made text: UnicodeError: planted" in str(
        requests[1].error
    )
    for request in (requests[0], *requests[2:]):
        assert request.output_token_ids == expected_output(request, VOCAB_SIZE)[0]
    check_nothing_leaked(service)
