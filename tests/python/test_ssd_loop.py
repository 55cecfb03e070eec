"""The tier on an SSD below a scheduler, over the fake engine, which checks every page's content."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from faulty_file import FaultyFile
from nanoflow.offload import offload
from nanoflow.offload.cost import CostModel
from nanoflow.offload.page_file import PageFile
from nanoflow.offload.ssd import SsdTier
from test_loop import check_nothing_leaked, serve
from test_offload import check_outputs, flush_device, follow_up, run_turns


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is on the SSD is waited for."""
    monkeypatch.setattr(CostModel, "is_worth", lambda *arguments: True)
    monkeypatch.setattr(CostModel, "compute_seconds", lambda *arguments: None)


def two_rounds(
    tmp_path: Path,
    file_type: type[PageFile],
    restart: bool = False,
    writes_at_once: bool = False,
) -> dict[str, Any]:
    """Conversations whose first round only the SSD still has; what was counted, and tokens found.

    The host has room for what one of the device's caches holds. Pages that it gives up before they
    are written are lost, unless writes are done as soon as they are asked for.
    """

    def make_ssd(pool: NDArray[np.uint8]) -> SsdTier:
        tier = SsdTier(tmp_path, 400 * 64, pool, "model", open_file=file_type)
        if writes_at_once:
            tier._writer.submit = lambda work: work()
        return tier

    service = serve((0.5,), host_slots=30, make_ssd=make_ssd)
    first = [service.request(n, 14, 22, ignore_eos=True) for n in range(4)]
    service.loop.submit(first)
    service.wait(4)
    for turn in range(3):
        flush_device(service, 100 * turn + 100)
    check_outputs(first)
    if restart:
        check_nothing_leaked(service)
        service = serve((0.5,), host_slots=30, make_ssd=make_ssd)
    second = [follow_up(service, 10 + n, one, 2) for n, one in enumerate(first)]
    service.loop.submit(second)
    service.wait(4)
    check_nothing_leaked(service)
    check_outputs(second)
    assert service.state.offload is not None
    stats = service.state.offload.stats()
    found = sum(request.num_cached_tokens for request in second)
    return {"ssd": stats.hits["ssd"], "found": found, **stats.errors}


@pytest.mark.parametrize("restart", [False, True])
def test_a_second_round_comes_from_the_ssd(tmp_path: Path, patient: None, restart: bool) -> None:
    counts = two_rounds(tmp_path, PageFile, restart, writes_at_once=True)
    assert counts == {"ssd": 80, "found": 80}  # 20 of 22 tokens of each


def test_read_errors_are_computed_again(tmp_path: Path, patient: None) -> None:
    class Failing(FaultyFile):
        reads_left = 3

    counts = two_rounds(tmp_path, Failing)
    assert counts["ssd_read"] >= 1
    assert counts["found"] == counts["ssd"] <= 12


def test_a_full_disk_loses_no_request(tmp_path: Path, patient: None) -> None:
    class Full(FaultyFile):
        writes_left = 7

    counts = two_rounds(tmp_path, Full)
    assert counts["ssd_full"] >= 1 and counts["ssd"] <= 28


def test_damage_is_computed_again(tmp_path: Path, patient: None) -> None:
    class Flipping(PageFile):
        def _write(self, page: memoryview, offset: int) -> int:
            changed = bytes([page[0] ^ 1]) + bytes(page[1:])
            return super()._write(memoryview(changed), offset)

    counts = two_rounds(tmp_path, Flipping)
    assert counts["ssd_damaged"] >= 4 and counts["found"] == 0


def test_a_slow_disk_is_not_waited_for(
    tmp_path: Path, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(FaultyFile):
        read_seconds = 0.5

    monkeypatch.setattr(CostModel, "compute_seconds", lambda *arguments: 0.01)
    begin = time.monotonic()
    counts = two_rounds(tmp_path, Slow)
    assert counts["found"] == 0
    assert time.monotonic() - begin < 8  # all reads, one behind the other, take 10 s


def test_nobody_waits_for_room_that_nobody_gives_up(
    tmp_path: Path, patient: None, blind: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if requests wait forever for what they want read, and the host is too small for it."""
    monkeypatch.setattr(offload, "MOST_READ_SECONDS", 1000.0)
    rng = np.random.default_rng(0)
    service = serve(
        (0.5,),
        host_slots=6,
        make_ssd=lambda pool: SsdTier(tmp_path, 300 * 64, pool, "model"),
    )
    for turn in range(4):
        requests = [service.request(100 * turn + n, max_len=36) for n in range(40)]
        for n, request in zip(rng.permutation(40).tolist(), requests, strict=True):
            request.prompt_token_ids = service.request(n, 1 + n % 30).prompt_token_ids
        service.loop.submit(requests)
        service.wait(40)
    check_nothing_leaked(service)


@pytest.mark.parametrize("host_slots", [3, 12, 40])
def test_aborts_leave_nothing_behind(
    tmp_path: Path, host_slots: int, patient: None, blind: None
) -> None:
    """Reads for requests that are gone, slots that are always short, a disk that is always full."""
    rng = np.random.default_rng(host_slots)
    service = serve(
        (0.5,),
        host_slots=host_slots,
        make_ssd=lambda pool: SsdTier(tmp_path, 50 * 64, pool, "model"),
        early=rng,
    )
    run_turns(service, rng)
    assert service.state.offload is not None
    assert service.state.offload.stats().errors == {}
