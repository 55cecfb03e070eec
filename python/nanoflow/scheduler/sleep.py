"""Sleep: an engine without requests gives its memory to others, and takes it back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from nanoflow.errors import EngineError
from nanoflow.scheduler.engine import Engine
from nanoflow.scheduler.inbox import Inbox
from nanoflow.scheduler.state import SchedulerState

logger = logging.getLogger(__name__)

TAGS = ("weights", "kv_cache")  # of what sleeps, and may be woken up apart
LEVELS = (1, 2)  # weights are kept in host memory, or discarded


def check_level(level: int) -> None:
    """Raises ValueError on a level that there is not."""
    if isinstance(level, bool) or level not in LEVELS:
        raise ValueError(f"level={level!r} is unknown; 1 keeps the weights, 2 discards them")


def check_tags(tags: Collection[str] | None) -> frozenset[str]:
    """All tags for None. Raises ValueError on a tag that there is not."""
    if tags is None:
        return frozenset(TAGS)
    if isinstance(tags, str) or not set(tags) <= set(TAGS):
        raise ValueError(f"tags={tags!r} must be a list of {' and '.join(map(repr, TAGS))}")
    return frozenset(tags)


class Sleeper:
    """Belongs to the scheduler's thread."""

    def __init__(
        self, inbox: Inbox, engine: Engine, state: SchedulerState, refill: Callable[[], None]
    ) -> None:
        self._inbox, self._engine, self._state, self._refill = inbox, engine, state, refill
        self._has_discarded = False

    def sleep(self, level: int) -> None:
        """No step is in flight. Raises EngineError while there are requests, and when the weights
        find no room on the host: then the engine is asleep, too."""
        with self._inbox.changed:  # no request comes in between
            if self._inbox.asleep:
                logger.warning("the engine is asleep already")
                return
            count = len(self._state.open_requests()) + len(self._inbox.requests)
            if count > 0:
                raise EngineError(f"{count} requests are open; wait for them, or abort them, first")
            if self._state.offload is not None:
                raise EngineError("an engine with kv_offloading_size cannot sleep")
            self._inbox.asleep, self._inbox.sleep_level = frozenset(TAGS), level
        self._state.forget_prefixes()
        self._has_discarded = level == 2
        self._engine.sleep(self._has_discarded)

    def wake_up(self, tags: Collection[str]) -> None:
        """The KV cache is there again once the weights are, in whatever order they are asked for.

        Raises EngineError where there is no room for them; they sleep on then.
        """
        asleep = self._inbox.asleep
        left = asleep - frozenset(tags)
        if "weights" in asleep - left:
            self._engine.wake_weights()
            if self._has_discarded:
                self._refill()
            self._has_discarded = False
        if asleep and not left:
            self._engine.wake_cache()
        self._inbox.asleep = left
