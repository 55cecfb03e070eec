"""Pages in a file on an SSD: the tier below host memory, which outlives the process."""

from __future__ import annotations

import errno
import fcntl
import os
import queue
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from nanoflow.offload.manifest import Entry, Manifest
from nanoflow.offload.page_file import DamagedPageError, PageFile
from nanoflow.offload.threads import Threads

READERS = 4  # threads
MOST_WRITES = 128  # on their way: a disk that is slower is left alone
PUBLISH_SECONDS = 5.0  # between manifests, while pages are written
RETRY_SECONDS = 30.0  # without writes, behind one that failed


@dataclass(frozen=True, slots=True)
class Done:
    """A page has been read or written, or could not be."""

    key: bytes
    slot: int  # of the host pool
    is_read: bool
    seconds: float
    error: str = ""  # kind, empty where all went well
    checksum: int = 0


class SsdTier:
    """Keys and their places in the file, the least recently used given away first.

    One thread calls; threads of its own read and write and leave a note each, which poll() takes.
    Nothing on the disk that the last manifest names is overwritten: places are used anew only by
    writes behind the manifest that no longer names them. So a process that is killed at any moment
    leaves a manifest whose pages are intact.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        pool: NDArray[np.uint8],
        fingerprint: str,
        *,
        open_file: Callable[[Path, int], PageFile] = PageFile,
    ) -> None:
        """`pool`: [slots, page bytes], what pages are read into and written from.

        Raises ValueError on a size too small for a page, on a folder that cannot be used, and on
        one that another engine uses.
        """
        self._pool = pool
        self.page_bytes = pool.shape[1]
        self.num_places = size // self.page_bytes
        if self.num_places == 0:
            raise ValueError(
                f"kv_offloading_ssd: {size} bytes hold no page, which takes {self.page_bytes}"
            )
        self._manifest = Manifest(folder / "manifest.json", fingerprint, self.page_bytes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder / "lock")
            try:
                self._file = open_file(folder / "pages", self.page_bytes)
                self._entries = OrderedDict(self._manifest.load(self.num_places))
            except OSError:
                os.close(self._lock)
                raise
        except OSError as error:
            raise ValueError(f"kv_offloading_ssd: cannot use {folder}: {error}") from error
        taken = {entry.place for entry in self._entries.values()}
        self._free = deque(place for place in range(self.num_places) if place not in taken)
        self._writing: dict[bytes, int] = {}  # places
        self._reading: dict[bytes, int] = {}  # places; their entries may have been forgotten
        self._notes: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._readers = Threads(READERS, "nanoflow-ssd-read")
        self._writer = Threads(1, "nanoflow-ssd-write")
        self._is_closing = False
        self._publish_time = perf_counter()
        self._is_published = True
        self._resume_time = 0.0  # no writes before
        self._unpublished: OSError | None = None  # why the last manifest was not saved

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries or key in self._writing

    def is_readable(self, key: bytes) -> bool:
        return key in self._entries and key not in self._reading

    @property
    def num_used(self) -> int:
        used: int = self.num_places - len(self._free)
        return used

    @property
    def num_reading(self) -> int:
        return len(self._reading)

    @property
    def num_writing(self) -> int:
        return len(self._writing)

    @property
    def can_write(self) -> bool:
        return len(self._writing) < MOST_WRITES and perf_counter() >= self._resume_time

    @property
    def is_working(self) -> bool:
        """Whether poll() has something to do, now or soon."""
        return bool(self._writing or self._reading or not self._is_published)

    def read(self, key: bytes, slot: int) -> None:
        """Begins to read a page that is_readable() into a slot that waits for it."""
        entry = self._entries[key]
        self._reading[key] = entry.place
        self._readers.submit(lambda: self._read(key, entry, slot))

    def touch(self, keys: Sequence[bytes]) -> None:
        """Pages of these keys have just been used. The last goes first, as from the host."""
        for key in reversed(keys):
            if key in self._entries:
                self._entries.move_to_end(key)

    def write(self, pages: Sequence[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
        """Begins to write pages from slots that stay as they are; those for which there is room."""
        begun: list[tuple[bytes, int, int]] = []
        for key, slot in pages:
            if not self._free:
                self._evict()
            if not self._free:
                break
            place = self._free.popleft()
            self._writing[key] = place
            begun.append((key, slot, place))
        if begun:
            self._writer.submit(lambda: self._write(begun))
        return [(key, slot) for key, slot, _ in begun]

    def poll(self) -> list[Done]:
        """What has been read and written since the last call."""
        done = []
        while not self._notes.empty():
            done.append(self._take(self._notes.get()))
        is_due = perf_counter() > self._publish_time + PUBLISH_SECONDS
        if is_due and not (self._is_published and self._unpublished is None):
            self._publish()
        return done

    def wait(self, timeout: float) -> list[Done]:
        """As poll(), but waits for a note if there is none."""
        try:
            first = self._take(self._notes.get(timeout=timeout))
        except queue.Empty:
            return []
        return [first, *self.poll()]

    def forget(self) -> None:
        """Nothing that is here will be found, now or by another process; writes under way will."""
        entries, self._entries = self._entries, OrderedDict()
        self._free.extend(e.place for key, e in entries.items() if key not in self._reading)
        self._publish()

    def close(self) -> list[Done]:
        """Ends the reads and writes that have begun, drops those that have not, leaves a manifest
        and lets the folder go. Returns the rest of what poll() would tell."""
        self._is_closing = True
        self._readers.close()
        self._writer.close()
        done = self.poll()
        self._save(list(self._entries.items()))
        self._file.close()
        os.close(self._lock)
        return done

    def check_integrity(self) -> None:
        """Asserts that every place is exactly one of free, written to and named by an entry."""
        named = {entry.place for entry in self._entries.values()}
        forgotten = set(self._reading.values()) - named
        places = sorted([*self._free, *self._writing.values(), *named, *forgotten])
        assert places == list(range(self.num_places))

    def _take(self, done: Done) -> Done:
        key = done.key
        if done.is_read:
            place = self._reading.pop(key)
            entry = self._entries.get(key)
            is_bad = done.error not in ("", "ssd_late")
            if is_bad and entry is not None and entry.place == place:
                del self._entries[key]
                entry = None
            if entry is None or entry.place != place:
                self._free.append(place)
                self._publish()
            return done
        place = self._writing.pop(key)
        if done.error:
            self._free.append(place)
            self._resume_time = perf_counter() + RETRY_SECONDS
        else:
            self._entries[key] = Entry(place, done.checksum)
            self._is_published = False
        return done

    def _evict(self) -> None:
        """Gives places of what has been used least recently away, many for one manifest."""
        count = max(1, self.num_places // 16)
        for key in [key for key in self._entries if key not in self._reading][:count]:
            self._free.append(self._entries.pop(key).place)
        self._publish()

    def _publish(self) -> None:
        """Before any write that is begun from now on."""
        if self._is_closing:  # close() saves one
            return
        entries = list(self._entries.items())
        self._writer.submit(lambda: self._save(entries))
        self._publish_time = perf_counter()
        self._is_published = True

    # What follows runs in threads of their own.

    def _save(self, entries: list[tuple[bytes, Entry]]) -> None:
        try:
            self._file.sync()
            self._manifest.save(entries)
            self._unpublished = None
        except OSError as error:
            self._unpublished = error

    def _write(self, pages: list[tuple[bytes, int, int]]) -> None:
        for key, slot, place in pages:
            begin = perf_counter()
            error, checksum = "", 0
            try:
                if self._unpublished is not None:
                    raise self._unpublished
                if self._is_closing:
                    error = "ssd_late"
                else:
                    checksum = self._file.write(place, memoryview(self._pool[slot]), key)
            except OSError as failure:
                error = "ssd_full" if _is_full(failure) else "ssd_write"
            self._notes.put(Done(key, slot, False, perf_counter() - begin, error, checksum))

    def _read(self, key: bytes, entry: Entry, slot: int) -> None:
        begin, error = perf_counter(), ""
        try:
            if self._is_closing:
                error = "ssd_late"
            else:
                self._file.read(entry.place, memoryview(self._pool[slot]), key, entry.checksum)
        except DamagedPageError:
            error = "ssd_damaged"
        except OSError:
            error = "ssd_read"
        self._notes.put(Done(key, slot, True, perf_counter() - begin, error))


def _is_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and error.errno in full


def _lock(path: Path) -> int:
    """Holds the folder until the file is closed, at the latest when the process ends."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 32).decode(errors="replace").strip()
        os.close(file)
        raise ValueError(
            f"kv_offloading_ssd: {path.parent} is in use by another engine (process {holder}); "
            "give each engine a folder of its own"
        ) from None
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file
