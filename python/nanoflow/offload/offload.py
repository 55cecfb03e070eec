"""What of the KV cache is copied to the tiers below the device, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

from nanoflow.offload.cost import CostModel, Rate
from nanoflow.offload.host import HostTier
from nanoflow.offload.ssd import READERS, Done, SsdTier
from nanoflow.offload.stats import OffloadStats, Transfer

WRITE_BATCH = 16  # pages
WRITE_LOOKAHEAD = 256  # of the pages that the host would give away next: to be on the SSD by then
WRITE_USAGE = 0.25  # of the host tier, from which on they are written
WRITE_SHARE = 0.25  # of the host tier, at most on its way to the SSD
READ_SHARE = 0.5  # of the host tier, at most for what has been read and not been used yet
FLUSH_SECONDS = 10.0  # at the end, to write what only the host has
MOST_READ_SECONDS = 1.0  # for a request's pages, while it is not known how long it computes them


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
    copies begun with one are settled when the next has been waited for.

    What the host would give away next is written to the SSD before; what is only there is read
    back when a request that wants it gets near its start, and the request is held back meanwhile,
    but not for longer than computing the pages would take twice.
    """

    def __init__(self, host: HostTier, cost: CostModel, ssd: SsdTier | None = None) -> None:
        self._host = host
        self._cost = cost
        self._ssd = ssd
        # (page, slot), of the step being planned
        self._loads: list[tuple[int, int]] = []
        self._stores: list[tuple[int, int]] = []
        self._store_rate, self._load_rate = Rate(), Rate()  # bytes
        self._read_rate = Rate()  # bytes, of all readers
        self._awaited: dict[bytes, float] = {}  # being read, and until when requests wait for it
        self._refused: dict[bytes, float] = {}  # to be read when there is room, likewise
        self._read_slots: set[int] = set()  # whose content was read for a request that still waits
        self._stats = OffloadStats()
        self.settled_step = -1  # all copies of steps up to it are done

    def stats(self) -> OffloadStats:
        usage = {"host": self._host.num_used / self._host.num_slots}
        if self._ssd is not None:
            usage["ssd"] = self._ssd.num_used / self._ssd.num_places
        return self._stats.snapshot(usage)

    @property
    def is_reading(self) -> bool:
        """Whether requests may be waiting for the SSD."""
        return bool(self._awaited or self._refused)

    @property
    def is_working(self) -> bool:
        """Whether poll() will have something to do though no step runs."""
        return self._ssd is not None and self._ssd.is_working

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Slots of the first keys that are worth loading."""
        slots = self._host.find(keys)
        return slots if slots and self._cost.is_worth(len(slots), self._load_rate) else []

    def load_cost(self, keys: Sequence[bytes]) -> tuple[int, float]:
        """Pages of the first keys that would be loaded, and tokens that are computed meanwhile."""
        pages = len(self.find(keys))
        return pages, self._cost.tokens_meanwhile(pages, self._load_rate)

    def is_awaited(self, key: bytes) -> bool:
        """Whether content is being read, or is to be read, that a request should wait for."""
        return perf_counter() < max(self._awaited.get(key, 0.0), self._refused.get(key, 0.0))

    def prefetch(self, keys: Sequence[bytes]) -> bool:
        """Begins to read what only the SSD has of the first keys, if it comes in time.

        False while what was read for others takes the host's room for it.
        """
        if self._ssd is None:
            return True
        refused = [self._refused.pop(key) for key in keys if key in self._refused]
        wanted = []
        for key in keys:
            if key not in self._host:
                if not self._ssd.is_readable(key):
                    break
                wanted.append(key)
        backlog = self._ssd.num_reading
        if not wanted or not self._cost.is_worth(len(wanted), self._read_rate, backlog):
            return True
        compute = self._cost.compute_seconds(len(wanted))
        deadline = perf_counter() + (MOST_READ_SECONDS if compute is None else 2 * compute)
        held = len(self._awaited) + len(self._read_slots)
        if held > 0 and held + len(wanted) > READ_SHARE * self._host.num_slots:
            self._refused[wanted[0]] = min(refused, default=deadline)
            return False
        for key in wanted:
            slot = self._host.reserve(key)
            if slot is None:
                break
            self._read_slots.discard(slot)
            self._ssd.read(key, slot)
            self._awaited[key] = deadline
        self._ssd.touch(wanted)
        return True

    def release(self, keys: Sequence[bytes]) -> None:
        """Who wanted content of these keys read waits no more."""
        if self._ssd is not None:
            self._read_slots.difference_update(map(self._host.slot_of, keys))
            for key in keys:
                self._refused.pop(key, None)
                self._awaited.pop(key, None)

    def touch(self, keys: Sequence[bytes]) -> None:
        """The device has content of these keys in use."""
        self._host.touch(keys)

    def load(
        self, slots: Sequence[int], pages: Sequence[int], *, sought: int, found: int, resumes: bool
    ) -> None:
        """A request starts with the next step, which needs what slots hold in these pages.

        Tokens: `sought` behind what the device has, and `found` in the slots. `resumes`: it has
        been preempted before.
        """
        self._host.pin(slots)
        self._loads.extend(zip(pages, slots, strict=True))
        read = self._read_slots.intersection(slots)
        if resumes:
            self._stats.resumed += found
            return
        of_ssd = found * len(read) // len(slots) if read else 0
        self._stats.queries += sought
        self._stats.hits["ssd"] += of_ssd
        self._stats.hits["host"] += found - of_ssd

    def store(self, page: int, key: bytes) -> bool:
        """A page is full behind the step being planned; says whether it is copied out then."""
        if not self._cost.is_worth(1, self._load_rate):
            return False
        slot = self._host.reserve(key)
        if slot is None:
            return False
        self._read_slots.discard(slot)
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
        """Copies have failed, or were never begun: what they brought is lost."""
        (self._host.unpin if is_load else self._host.drop)(moves.slots)

    def observe_step(self, prefill_rows: int, decodes: int, seconds: float) -> None:
        self._cost.observe_step(prefill_rows, decodes, seconds)

    def poll(self) -> None:
        """Takes what the SSD has done, and gives it more to do. Once a turn."""
        if self._ssd is None:
            return
        for done in self._ssd.poll():
            self._take(done)
        self._write_ahead(self._ssd)

    def wait(self, seconds: float) -> None:
        """Sleeps until something has been read or written, or lets those have the room that wait
        for it, when nothing is being read for those that hold it."""
        if self._ssd is None:
            return
        if self._refused and not self._ssd.num_reading:
            self._read_slots.clear()
            self._refused.clear()
            return
        for done in self._ssd.wait(seconds):
            self._take(done)

    def forget(self) -> None:
        """Requests from now on find nothing here."""
        self._host.forget()
        self._awaited.clear()
        self._refused.clear()
        self._read_slots.clear()
        if self._ssd is not None:
            self._ssd.forget()

    def close(self) -> None:
        """Leaves on the SSD what only the host has, as far as that goes in FLUSH_SECONDS."""
        if self._ssd is None:
            return
        deadline = perf_counter() + FLUSH_SECONDS
        dirty = [(key, slot) for slot, key in self._host.oldest() if key not in self._ssd]
        dirty = dirty[-self._ssd.num_places :]
        while (dirty or self._ssd.num_writing) and perf_counter() < deadline:
            if dirty and self._ssd.can_write:
                self._write(self._ssd, dirty[:WRITE_BATCH])
                dirty = dirty[WRITE_BATCH:]
            elif not self._ssd.num_writing:
                break  # the SSD takes no more
            else:
                self.wait(deadline - perf_counter())
        for done in self._ssd.close():
            self._take(done)

    def check_integrity(self) -> None:
        self._host.check_integrity()
        if self._ssd is not None:
            self._ssd.check_integrity()

    def check_idle(self) -> None:
        """Asserts, when no step is on its way, that no slot is kept for anybody."""
        self.check_integrity()
        assert self._host.num_pinned() == 0
        assert not (self._awaited or self._refused or self._read_slots)
        assert len(self._loads) == len(self._stores) == 0

    def _write_ahead(self, ssd: SsdTier) -> None:
        if self._host.num_used < WRITE_USAGE * self._host.num_slots or not ssd.can_write:
            return
        if not self._cost.is_worth(1, self._read_rate):
            return
        room = int(WRITE_SHARE * self._host.num_slots) - ssd.num_writing
        oldest = islice(self._host.oldest(), WRITE_LOOKAHEAD)
        dirty = [(key, slot) for slot, key in oldest if key not in ssd]
        for begin in range(0, min(room, len(dirty)), WRITE_BATCH):
            if ssd.can_write:
                self._write(ssd, dirty[begin : begin + WRITE_BATCH])

    def _write(self, ssd: SsdTier, pages: list[tuple[bytes, int]]) -> None:
        self._host.pin([slot for _, slot in ssd.write(pages)])

    def _take(self, done: Done) -> None:
        is_wanted = done.is_read and self._awaited.pop(done.key, None) is not None
        if not done.is_read:
            self._host.unpin([done.slot])
        if done.error:
            self._stats.errors[done.error] = self._stats.errors.get(done.error, 0) + 1
            if done.is_read:
                self._host.drop([done.slot])
            return
        size = self._cost.page_bytes
        if done.is_read:
            self._host.settle([done.slot])
            if is_wanted:
                self._read_slots.add(done.slot)
            self._stats.add(Transfer.READ, size, done.seconds)
            self._read_rate.observe(size * READERS, done.seconds)
        else:
            self._stats.add(Transfer.WRITE, size, done.seconds)

    def _count_copies(self, transfer: Transfer, rate: Rate, pages: int, seconds: float) -> None:
        size = pages * self._cost.page_bytes
        self._stats.add(transfer, size, seconds)
        rate.observe(size, seconds)


def _moves(pairs: list[tuple[int, int]]) -> PageMoves:
    pages, slots = zip(*pairs, strict=True) if pairs else ((), ())
    return PageMoves(pages, slots)
