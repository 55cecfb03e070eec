"""Which slot of the host pool holds which page's content: the tier below the device's pages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from enum import IntEnum


class HostState(IntEnum):
    FREE = 0  # holds nothing
    ARRIVING = 1  # content is being copied or read into it
    HELD = 2  # content can be found by its key, until the slot is needed for another


class HostTier:
    """Slots by the key of what they hold, the least recently used given away first.

    Somebody who reads a slot pins it meanwhile: it keeps its content even when it is forgotten.
    Not thread-safe.
    """

    def __init__(self, num_slots: int) -> None:
        """Raises ValueError without a slot."""
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots} but a tier needs at least one")
        self.num_slots = num_slots
        self._free = list(range(num_slots))[::-1]
        self._state = [HostState.FREE] * num_slots
        self._key: list[bytes | None] = [None] * num_slots  # None: nobody may find it any more
        self._pins = [0] * num_slots
        self._slot_of: dict[bytes, int] = {}  # arriving and held
        self._held: OrderedDict[int, None] = OrderedDict()  # with a key, least recently used first

    @property
    def num_used(self) -> int:
        """Slots that hold something, or are about to."""
        return self.num_slots - len(self._free)

    def __contains__(self, key: bytes) -> bool:
        """Whether content is held or on its way."""
        return key in self._slot_of

    def slot_of(self, key: bytes) -> int | None:
        """Where content is held or on its way."""
        return self._slot_of.get(key)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The slots of the first keys, up to one whose content is not held."""
        slots = []
        for key in keys:
            slot = self._slot_of.get(key)
            if slot is None or self._state[slot] != HostState.HELD:
                break
            slots.append(slot)
        return slots

    def touch(self, keys: Sequence[bytes]) -> None:
        """Content of these keys, where it is held, has just been used. The last goes first: what
        follows a page is of no use without it."""
        for key in reversed(keys):
            slot = self._slot_of.get(key)
            if slot is not None and slot in self._held:
                self._held.move_to_end(slot)

    def oldest(self) -> Iterable[tuple[int, bytes]]:
        """Held slots and their keys, in the order in which they would be given away."""
        for slot in self._held:
            key = self._key[slot]
            assert key is not None
            yield slot, key

    def reserve(self, key: bytes) -> int | None:
        """A slot for content that is about to arrive; None when it is here, or all are in use."""
        if key in self._slot_of:
            return None
        if not self._free:
            victim = next((slot for slot in self._held if not self._pins[slot]), None)
            if victim is None:
                return None
            self._forget_key(victim)
            self._empty(victim)
        slot = self._free.pop()
        self._state[slot] = HostState.ARRIVING
        self._key[slot] = key
        self._slot_of[key] = slot
        return slot

    def settle(self, slots: Sequence[int]) -> None:
        """The content of reserved slots has arrived."""
        for slot in slots:
            assert self._state[slot] == HostState.ARRIVING
            self._state[slot] = HostState.HELD
            if self._key[slot] is None:
                self._empty(slot)
            else:
                self._held[slot] = None

    def drop(self, slots: Sequence[int]) -> None:
        """The content of reserved slots will not arrive."""
        for slot in slots:
            assert self._state[slot] == HostState.ARRIVING
            self._forget_key(slot)
            self._empty(slot)

    def pin(self, slots: Sequence[int]) -> None:
        """Held slots are read from now on."""
        for slot in slots:
            assert self._state[slot] == HostState.HELD
            self._pins[slot] += 1

    def unpin(self, slots: Sequence[int]) -> None:
        """A reader is done with them."""
        for slot in slots:
            self._pins[slot] -= 1
            if not self._pins[slot] and self._key[slot] is None:
                self._empty(slot)

    def forget(self) -> None:
        """Nothing that is here or on its way will be found."""
        for slot in list(self._slot_of.values()):
            self._forget_key(slot)
            if self._state[slot] == HostState.HELD and not self._pins[slot]:
                self._empty(slot)

    def check_integrity(self) -> None:
        """Asserts that every slot is exactly one of free, arriving and held."""
        assert sorted(self._free) == [
            slot for slot, state in enumerate(self._state) if state == HostState.FREE
        ]
        for slot, state in enumerate(self._state):
            key = self._key[slot]
            assert (slot in self._held) == (state == HostState.HELD and key is not None)
            assert key is None or self._slot_of[key] == slot
            assert state == HostState.HELD or not self._pins[slot]
            if state == HostState.HELD and key is None:
                assert self._pins[slot], "a forgotten slot would never come back"
            assert state != HostState.FREE or key is None
        assert len(self._slot_of) == sum(key is not None for key in self._key)

    def num_pinned(self) -> int:
        return sum(pins > 0 for pins in self._pins)

    def _forget_key(self, slot: int) -> None:
        key = self._key[slot]
        if key is not None:
            del self._slot_of[key]
            self._key[slot] = None
        self._held.pop(slot, None)

    def _empty(self, slot: int) -> None:
        self._state[slot] = HostState.FREE
        self._free.append(slot)
