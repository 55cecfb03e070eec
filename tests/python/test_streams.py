"""Tokens on their way from the scheduler's thread, over the fake engine."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from nanoflow.request import Request
from nanoflow.streams import Outbox, OutputStream
from test_loop import check_nothing_leaked, serve


class Reader(OutputStream):
    """Keeps what it hears, and which thread told it."""

    def __init__(self, outbox: Outbox) -> None:
        self.mailbox = outbox.mailbox(asyncio.get_running_loop())
        self.requests: Sequence[Request] = ()
        self._outbox = outbox
        self.heard: list[int] = []
        self.threads: set[int] = set()

    def take(self, index: int, token: int) -> None:
        self.heard.append(token)
        self.threads.add(threading.get_ident())


def test_every_token_is_told_once_though_requests_are_preempted(blind: None) -> None:
    service = serve((0.5,), early=np.random.default_rng(0))
    heard: dict[str, list[int]] = defaultdict(list)
    requests = [service.request(n, 1 + n % 20) for n in range(60)]
    for request in requests[::2]:
        request.on_token = heard[request.id].append
    service.loop.submit(requests)
    service.wait(60)
    assert sum(request.num_preemptions for request in requests[::2]) > 0
    for request in requests[::2]:
        assert heard[request.id] == request.output_token_ids
    assert len(heard) == 30
    check_nothing_leaked(service)


def test_an_event_loop_is_called_at_most_once_a_turn() -> None:
    service = serve()
    outbox = Outbox(service.loop.abort)
    turns = 0

    def end_turn() -> None:
        nonlocal turns
        turns += 1
        outbox.flush()

    service.loop.call_after_turns(end_turn)

    async def read() -> tuple[list[Reader], int]:
        loop = asyncio.get_running_loop()
        calls = 0
        call_soon = loop.call_soon_threadsafe

        def count(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return call_soon(*arguments, **options)

        loop.call_soon_threadsafe = count  # type: ignore[method-assign]
        readers = [Reader(outbox) for _ in range(20)]
        requests = [service.request(n) for n in range(20)]
        for reader, request in zip(readers, requests, strict=True):
            request.on_token, request.on_finish = partial(reader.put_token, 0), reader.put_end
            reader.requests = [request]
        service.loop.submit(requests)
        while not all(reader.heard[-1:] == [-1] for reader in readers):
            await asyncio.sleep(0.001)
        return readers, calls

    readers, calls = asyncio.run(asyncio.wait_for(read(), 30))
    service.loop.close()
    assert 0 < calls <= turns
    for reader in readers:
        [request] = reader.requests
        assert reader.heard == [*request.output_token_ids, -1]
        assert reader.threads == {threading.get_ident()}
    check_nothing_leaked(service)
