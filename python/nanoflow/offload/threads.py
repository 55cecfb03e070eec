"""Threads that run what they are given. They work until they are closed, also while the
interpreter shuts down, which those of concurrent.futures do not."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Threads:
    """`count` threads that take tasks in the order in which they come. Tasks must not raise."""

    def __init__(self, count: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{n}", daemon=True)
            for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], None]) -> None:
        self._tasks.put(task)

    def close(self) -> None:
        """Returns when all that was submitted has been done."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
