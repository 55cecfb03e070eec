"""What the scheduler's thread holds when no request is left does not grow with what it has done."""

from __future__ import annotations

import gc
import threading
from collections import deque
from types import ModuleType
from typing import Any

import pytest

from fake_engine import FakeEngine
from nanoflow.scheduler.worker import Worker
from test_loop import Service, check_nothing_leaked, serve, wait_until

CONTAINERS = (list, dict, tuple, set, frozenset, deque)
OTHERS = (type, ModuleType, threading.Thread, FakeEngine)  # what a fake engine keeps is its own


def held_by(root: object) -> int:
    """Items of all containers that can be reached from an object, code left out."""
    found, rest, seen = 0, [root], {id(root)}
    while rest:
        one = rest.pop()
        found += len(one) if isinstance(one, CONTAINERS) else 0
        for other in gc.get_referents(one):
            if id(other) not in seen and not isinstance(other, OTHERS) and not callable(other):
                seen.add(id(other))
                rest.append(other)
    return found


def run(service: Service, numbers: range, **changes: Any) -> None:
    requests = [service.request(n, 4 + n % 9, 14 + n % 23, **changes) for n in numbers]
    service.loop.submit(requests)
    for number in list(numbers)[::7]:
        service.loop.abort([str(number)])
    service.wait(len(requests))
    wait_until(lambda: not service.state.has_requests)


@pytest.mark.parametrize("host_slots", [0, 12])
def test_what_is_held_does_not_grow(host_slots: int) -> None:
    service = serve(host_slots=host_slots)
    [worker] = [
        one
        for one in gc.get_objects()
        if type(one) is Worker and vars(one).get("_state") is service.state
    ]
    run(service, range(150))
    steps, before = service.engine.completed_steps, held_by(worker)
    run(service, range(150, 600))
    assert service.engine.completed_steps > steps + 500
    assert held_by(worker) < before + 200
    check_nothing_leaked(service)
