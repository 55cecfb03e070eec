"""The list of what a page file holds, replaced as a whole so that it is never half written."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

LAYOUT = 2  # of the page file and of this list; another one is not read


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a page is, and what its bytes sum to."""

    place: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A file of keys and entries, the least recently used first, for caches of one fingerprint."""

    path: Path
    fingerprint: str  # of model, dtype, page size and device: what makes pages interchangeable
    page_bytes: int

    def save(self, entries: Iterable[tuple[bytes, Entry]]) -> None:
        """Replaces the file; after a crash at any moment it is the old one or this. Raises
        OSError."""
        content = {
            "layout": LAYOUT,
            "fingerprint": self.fingerprint,
            "page_bytes": self.page_bytes,
            "pages": [[key.hex(), entry.place, entry.checksum] for key, entry in entries],
        }
        temporary = self.path.with_suffix(".new")
        with temporary.open("w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load(self, num_places: int) -> list[tuple[bytes, Entry]]:
        """What save() was given last; nothing where there is no file, or one that another model
        left, or a damaged one. Raises OSError."""
        if not self.path.exists():
            return []
        try:
            content = json.loads(self.path.read_bytes())
            kind = (content["layout"], content["fingerprint"], content["page_bytes"])
            if kind != (LAYOUT, self.fingerprint, self.page_bytes):
                logger.warning("%s is of another model or layout: its pages are lost", self.path)
                return []
            entries = [
                (bytes.fromhex(key), Entry(int(place), int(checksum)))
                for key, place, checksum in content["pages"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged, its pages are lost: %s", self.path, error)
            return []
        return [(key, entry) for key, entry in entries if 0 <= entry.place < num_places]
