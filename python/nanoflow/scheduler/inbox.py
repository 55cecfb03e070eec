"""What other threads want of the scheduler's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanoflow.errors import EngineError
from nanoflow.request import Request
from nanoflow.scheduler.stats import StepListener

if TYPE_CHECKING:
    from nanoflow.scheduler.worker import Worker


@dataclass(slots=True)
class Inbox:
    """What other threads leave for the scheduler's; `changed` guards all of it."""

    step_listener: StepListener | None
    on_turn: Callable[[], None] | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)
    requests: list[Request] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    forgets_prefixes: bool = False
    calls: list[tuple[Callable[[Worker], None], Future[None]]] = field(default_factory=list)
    doomed: int | None = None  # all open requests and the first so many of `requests`
    asleep: frozenset[str] = frozenset()  # of nanoflow.scheduler.sleep.TAGS
    sleep_level: int = 0
    is_closing: bool = False
    failure: BaseException | None = None

    def has_news(self) -> bool:
        is_told = self.forgets_prefixes or self.doomed is not None or self.is_closing
        return bool(self.requests or self.aborts or self.calls) or is_told

    def closed_error(self) -> EngineError:
        if self.failure is None:
            return EngineError("the engine has been closed; make another LLM")
        error = EngineError(f"the engine has failed and is closed: {self.failure}")
        error.__cause__ = self.failure
        return error
