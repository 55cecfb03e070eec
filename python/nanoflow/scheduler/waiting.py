"""The requests that wait, the most urgent first."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import takewhile

from nanoflow.errors import QueueFullError
from nanoflow.request import Request


class WaitingQueue:
    """By priority, the lowest first, and among equals in the order of arrival. Not thread-safe."""

    def __init__(
        self, max_requests: int | None = None, max_prompt_tokens: int | None = None
    ) -> None:
        """Requests are not let in beyond these sizes (None: any); preempted ones are, always."""
        self._max_requests = max_requests
        self._max_prompt_tokens = max_prompt_tokens
        self._prompt_tokens = 0
        self._requests: dict[str, Request] = {}
        self._priorities: list[int] = []  # that requests here have, ascending
        self._of_priority: dict[int, OrderedDict[str, Request]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        for priority in self._priorities:
            yield from self._of_priority[priority].values()

    def check_room(self, request: Request) -> None:
        """Raises QueueFullError when a new request may not wait here."""
        if self._max_requests is not None and len(self) >= self._max_requests:
            raise QueueFullError(request.id, len(self), self._max_requests, "reqs")
        tokens, most = self._prompt_tokens, self._max_prompt_tokens
        if most is not None and tokens + len(request.prompt_token_ids) > most and tokens > 0:
            raise QueueFullError(request.id, tokens, most, "tokens")

    def add(self, request: Request) -> None:
        """Behind those of its priority."""
        queue = self._of_priority.get(request.priority)
        if queue is None:
            queue = self._of_priority[request.priority] = OrderedDict()
            insort(self._priorities, request.priority)
        self._prompt_tokens += len(request.prompt_token_ids)
        queue[request.id] = self._requests[request.id] = request

    def put_back(self, request: Request, age_of: Mapping[str, int]) -> None:
        """Where it was: behind those of its priority that are older. Few are, as it has run."""
        self.add(request)
        queue, age = self._of_priority[request.priority], age_of[request.id]
        older = list(takewhile(lambda other: age_of[other] < age, queue))
        for name in (request.id, *reversed(older)):
            queue.move_to_end(name, last=False)

    def pop(self, request_id: str) -> Request | None:
        """Takes a request out, if it is here."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._prompt_tokens -= len(request.prompt_token_ids)
            queue = self._of_priority[request.priority]
            del queue[request_id]
            if not queue:
                del self._of_priority[request.priority]
                self._priorities.remove(request.priority)
        return request
