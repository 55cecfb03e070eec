"""What of the KV cache is copied to the tiers below the device, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.offload.cost import CostModel, Rate
from nanoflow.offload.host import HostTier
from nanoflow.offload.stats import OffloadStats, Transfer


@dataclass(frozen=True, slots=True)
class PageMoves:
    """Pages of the device and slots of the host pool: entries i belong together."""

    pages: tuple[int, ...]
    slots: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.pages)


NO_MOVES = PageMoves((), ())


class Offload:
    """Decides, for the scheduler's thread, which pages to copy out and which to load.

    Every full page is copied out once, as soon as its tokens are known: nothing is left to do when
    a request ends or is preempted, and a page can be granted anew as soon as its copy is done. A
    request that starts takes from the host what the device no longer has. Both end with steps: the
    copies begun with one are settled by the caller's settle().
    """

    def __init__(self, host: HostTier, cost: CostModel) -> None:
        self._host = host
        self._cost = cost
        # (page, slot), of the step being planned
        self._loads: list[tuple[int, int]] = []
        self._stores: list[tuple[int, int]] = []
        self._store_rate, self._load_rate = Rate(), Rate()  # bytes
        self._stats = OffloadStats()
        self.settled_step = -1  # all copies of steps up to it are done

    def stats(self) -> OffloadStats:
        return self._stats.snapshot({"host": self._host.num_used / self._host.num_slots})

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Slots of the first keys that are worth loading."""
        slots = self._host.find(keys)
        return slots if slots and self._cost.is_worth(len(slots), self._load_rate) else []

    def touch(self, keys: Sequence[bytes]) -> None:
        """The device has content of these keys in use."""
        self._host.touch(keys)

    def count(self, queries: int, hits: int, *, is_resumed: bool) -> None:
        """A request has started: tokens that were looked for here, and those found."""
        if is_resumed:
            self._stats.resumed += hits
            return
        self._stats.queries += queries
        self._stats.hits["host"] += hits

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """The next step needs what slots hold in these pages."""
        self._host.pin(slots)
        self._loads.extend(zip(pages, slots, strict=True))

    def store(self, page: int, key: bytes) -> bool:
        """A page is full behind the step being planned; says whether it is copied out then."""
        if not self._cost.is_worth(1, self._load_rate):
            return False
        slot = self._host.reserve(key)
        if slot is None:
            return False
        self._stores.append((page, slot))
        return True

    def take_moves(self) -> tuple[PageMoves, PageMoves]:
        """Loads and stores since the last call."""
        moves = _moves(self._loads), _moves(self._stores)
        self._loads, self._stores = [], []
        return moves

    def loaded(self, moves: PageMoves, seconds: float) -> None:
        """Loads have been done, and have taken so long."""
        self._host.unpin(moves.slots)
        self._count_copies(Transfer.LOAD, self._load_rate, len(moves), seconds)

    def stored(self, moves: PageMoves, seconds: float) -> None:
        """Stores have been done, and have taken so long."""
        self._host.settle(moves.slots)
        self._count_copies(Transfer.STORE, self._store_rate, len(moves), seconds)

    def abandon(self, moves: PageMoves, *, is_load: bool) -> None:
        """Copies have failed, or were never begun; what they brought is to be forgotten."""
        (self._host.unpin if is_load else self._host.settle)(moves.slots)

    def observe_step(self, prefill_rows: int, decodes: int, seconds: float) -> None:
        self._cost.observe_step(prefill_rows, decodes, seconds)

    def forget(self) -> None:
        """Requests from now on find nothing here."""
        self._host.forget()

    def check_integrity(self) -> None:
        self._host.check_integrity()

    def check_idle(self) -> None:
        """Asserts, when no step is on its way, that no slot is kept for anybody."""
        self._host.check_integrity()
        assert self._host.num_pinned() == 0
        assert len(self._loads) == len(self._stores) == 0

    def _count_copies(self, transfer: Transfer, rate: Rate, pages: int, seconds: float) -> None:
        size = pages * self._cost.page_bytes
        self._stats.add(transfer, size, seconds)
        rate.observe(size, seconds)


def _moves(pairs: list[tuple[int, int]]) -> PageMoves:
    pages, slots = zip(*pairs, strict=True) if pairs else ((), ())
    return PageMoves(pages, slots)
