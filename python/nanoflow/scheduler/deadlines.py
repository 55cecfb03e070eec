"""Requests that may take only so long."""

from __future__ import annotations

import heapq
import math

from nanoflow.request import Request

TIMEOUT = "timeout"  # the stop_reason of a request that has taken too long


class Deadlines:
    """The open requests with a timeout, the next to expire first. Not thread-safe."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._count = 0

    def add(self, request: Request) -> None:
        if math.isfinite(request.timeout):
            self._count += 1
            heapq.heappush(
                self._heap, (request.arrival_time + request.timeout, self._count, request)
            )

    def expired(self, now: float) -> list[Request]:
        """Takes out those whose time is up and that have not finished."""
        late = []
        while self._heap and (
            self._heap[0][0] <= now or self._heap[0][2].finish_reason is not None
        ):
            request = heapq.heappop(self._heap)[2]
            if request.finish_reason is None:
                late.append(request)
        return late
