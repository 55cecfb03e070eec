"""The tier on an SSD: what it keeps over restarts, and what it does when the disk fails."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from faulty_file import FaultyFile
from nanoflow.config import parse_ssd
from nanoflow.offload import ssd as ssd_module
from nanoflow.offload.ssd import Done, SsdTier

PAGE_BYTES = 8192
SLOTS = 8


def make_pool() -> NDArray[np.uint8]:
    """Random pages, aligned as those of an engine."""
    memory = mmap.mmap(-1, SLOTS * PAGE_BYTES)
    pool = np.frombuffer(memory, np.uint8).reshape(SLOTS, PAGE_BYTES)
    pool[:] = np.random.default_rng(0).integers(0, 256, pool.shape)
    return pool


def make_tier(folder: Path, pages: int = 16, fingerprint: str = "model", **options: Any) -> SsdTier:
    return SsdTier(folder, pages * PAGE_BYTES, make_pool(), fingerprint, **options)


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def finish(tier: SsdTier) -> list[Done]:
    done: list[Done] = []
    while tier.num_reading or tier.num_writing:
        done += tier.wait(10.0)
    tier.check_integrity()
    return done


def write(tier: SsdTier, numbers: list[int]) -> list[Done]:
    """Page n is written from slot n mod SLOTS."""
    tier.write([(key_of(n), n % SLOTS) for n in numbers])
    return finish(tier)


def read(tier: SsdTier, number: int, slot: int) -> Done:
    tier._pool[slot] = 0
    tier.read(key_of(number), slot)
    [done] = finish(tier)
    return done


def test_pages_come_back_after_a_restart(tmp_path: Path) -> None:
    tier = make_tier(tmp_path / "new" / "folder")
    assert all(not done.error for done in write(tier, [0, 1, 2, 3]))
    tier.close()
    tier = make_tier(tmp_path / "new" / "folder")
    expected = make_pool()
    for number in (2, 0, 3, 1):
        assert tier.is_readable(key_of(number)) and not tier.is_readable(key_of(number + 4))
        assert not read(tier, number, 7).error
        np.testing.assert_array_equal(tier._pool[7], expected[number])
    tier.close()


@pytest.mark.parametrize("other", ["model", "fingerprint"])
def test_pages_of_another_model_are_not_found(tmp_path: Path, other: str) -> None:
    tier = make_tier(tmp_path)
    write(tier, [0, 1])
    tier.close()
    tier = make_tier(tmp_path, fingerprint=other)
    assert tier.is_readable(key_of(0)) == (other == "model")
    tier.close()


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    tier = make_tier(tmp_path, pages=4)
    write(tier, [0, 1, 2, 3])
    tier.touch([key_of(0), key_of(7)])  # used again
    write(tier, [4, 5])
    assert [n for n in range(6) if key_of(n) in tier] == [0, 3, 4, 5]
    tier.close()
    tier = make_tier(tmp_path, pages=4)
    write(tier, [6])  # the order has outlived the restart
    assert [n for n in range(7) if key_of(n) in tier] == [0, 4, 5, 6]
    tier.forget()
    tier.close()
    tier = make_tier(tmp_path, pages=4)
    assert tier.num_used == 0
    tier.close()


def test_the_end_of_a_conversation_goes_before_its_beginning(tmp_path: Path) -> None:
    tier = make_tier(tmp_path, pages=3)
    write(tier, [0, 1, 2])
    tier.touch([key_of(0), key_of(1), key_of(2)])
    write(tier, [3])
    assert [n for n in range(4) if key_of(n) in tier] == [0, 1, 3]
    tier.close()


def damage(path: Path, kind: str, place: int) -> None:
    if kind == "truncated":
        os.truncate(path, place * PAGE_BYTES + 100)
        return
    with path.open("r+b") as file:
        file.seek(place * PAGE_BYTES + 5000)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
def test_a_damaged_page_is_noticed_and_dropped(tmp_path: Path, kind: str) -> None:
    tier = make_tier(tmp_path)
    write(tier, [0, 1, 2])
    tier.close()
    damage(tmp_path / "pages", kind, place=2)
    tier = make_tier(tmp_path)
    assert not read(tier, 0, 7).error and not read(tier, 1, 7).error
    assert read(tier, 2, 7).error == "ssd_damaged"
    assert not tier.is_readable(key_of(2))
    assert all(not done.error for done in write(tier, [2]))
    assert not read(tier, 2, 7).error
    tier.close()


def test_a_page_under_another_key_is_noticed(tmp_path: Path) -> None:
    tier = make_tier(tmp_path)
    write(tier, [0])
    tier.close()
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(key_of(0).hex(), key_of(1).hex()))
    tier = make_tier(tmp_path)
    assert read(tier, 1, 7).error == "ssd_damaged"
    tier.close()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"layout": 1}'])
def test_a_damaged_manifest_means_an_empty_tier(tmp_path: Path, content: str) -> None:
    tier = make_tier(tmp_path)
    write(tier, [0])
    tier.close()
    (tmp_path / "manifest.json").write_text(content)
    tier = make_tier(tmp_path)
    assert tier.num_used == 0
    assert all(not done.error for done in write(tier, [1]))
    tier.close()


def test_a_full_disk_keeps_what_it_has(tmp_path: Path) -> None:
    class Full(FaultyFile):
        writes_left = 2

    tier = make_tier(tmp_path, open_file=Full)
    errors = [done.error for done in write(tier, [0, 1, 2, 3])]
    assert errors == ["", "", "ssd_full", "ssd_full"]
    assert not tier.can_write  # for a while
    assert tier.num_used == 2 and not read(tier, 1, 7).error
    tier.close()


def test_a_limit_of_the_system_is_a_full_disk(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stops writes as a quota does, partway through a page."""
    code = (
        "import resource, sys; from test_ssd import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 4096, 5 * 4096))\n"
        "tier = make_tier(Path(sys.argv[1]))\n"
        "print([done.error for done in write(tier, [0, 1, 2])])\n"
        "tier.close()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "['', '', 'ssd_full']"
    tier = make_tier(tmp_path)
    assert not read(tier, 0, 7).error and not read(tier, 1, 7).error
    tier.close()


def test_a_slow_disk_does_not_hold_up_the_end(tmp_path: Path) -> None:
    class Slow(FaultyFile):
        def _write(self, page: memoryview, offset: int) -> int:
            time.sleep(0.2)
            return super()._write(page, offset)

    tier = make_tier(tmp_path, open_file=Slow)
    tier.write([(key_of(n), n) for n in range(8)])
    begin = time.monotonic()
    errors = [done.error for done in tier.close()]
    assert time.monotonic() - begin < 1.0
    assert errors.count("ssd_late") >= 6
    tier = make_tier(tmp_path)
    assert tier.num_used == errors.count("")
    tier.close()


def test_a_folder_that_is_gone_stops_writes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_module, "PUBLISH_SECONDS", 0.0)
    folder = tmp_path / "ssd"
    tier = make_tier(folder, pages=4)
    write(tier, [0, 1, 2, 3])
    folder.rename(tmp_path / "elsewhere")  # at once: a manifest of theirs may just be written
    # Place for these needs a manifest without those before, which cannot be saved.
    assert [done.error for done in write(tier, [4, 5])] == ["ssd_write"] * 2
    assert not read(tier, 3, 7).error  # the file lives as long as it is open
    tier.close()


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot use .*file/kv"):
        make_tier(tmp_path / "file" / "kv")
    with pytest.raises(ValueError, match=r"hold no page, which takes 8192"):
        make_tier(tmp_path, pages=0)
    tier = make_tier(tmp_path)
    with pytest.raises(ValueError, match=rf"in use by another engine \(process {os.getpid()}\)"):
        make_tier(tmp_path)
    tier.close()
    make_tier(tmp_path).close()


def test_killed_while_writing_leaves_a_manifest_of_intact_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places are used again all the time; whatever the last manifest names can be read."""
    code = (
        "import sys; from test_ssd import *\n"
        "ssd_module.PUBLISH_SECONDS = 0.0\n"
        "tier = make_tier(Path(sys.argv[1]), pages=12)\n"
        "for begin in range(0, 10**9, 4):\n"
        "    write(tier, list(range(begin, begin + 4)))\n"
        "    print(begin, flush=True)\n"
    )
    for delay in (0.0, 0.1):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            while int(process.stdout.readline()) < 40:
                pass
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        content = json.loads((tmp_path / "manifest.json").read_text())
        tier = make_tier(tmp_path, pages=12)
        expected = make_pool()
        assert len(content["pages"]) == tier.num_used > 0
        for name, _, _ in content["pages"]:
            number = int.from_bytes(bytes.fromhex(name), "little")
            assert not read(tier, number, 7).error
            tier_page = expected[number % SLOTS]
            np.testing.assert_array_equal(tier._pool[7], tier_page)
        tier.close()
        shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("argument", "path", "size"),
    [
        ("/mnt/kv:2", "/mnt/kv", 2 << 30),
        ("a:b:500M", "a:b", 500 << 20),
        ("kv:1.5GiB", "kv", 3 << 29),
        ("kv:1tb", "kv", 1 << 40),
    ],
)
def test_path_and_size(argument: str, path: str, size: int) -> None:
    assert parse_ssd(argument) == (Path(path), size)


@pytest.mark.parametrize("argument", ["/mnt/kv", ":5", "kv:", "kv:0", "kv:-1", "kv:5X"])
def test_what_is_no_path_and_size(argument: str) -> None:
    with pytest.raises(ValueError, match="PATH:SIZE"):
        parse_ssd(argument)
