"""Pages that go to the host pool and come back elsewhere, step by step on the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import DEVICES
from engine_driver import PAGE_SIZE, Chunk, EngineDriver, Sequence, load_engine
from nanoflow import _core
from nanoflow.schedule import built_in_schedule
from tiny_models import write_tiny_llama

SLOTS = 12
PAGES = 5  # full ones of the sequence that moves


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(
        tmp_path_factory.mktemp("llama"), num_layers=3, hidden_size=256, intermediate_size=384
    )


def make_driver(model: Path, device: str, jitter_us: int = 0) -> EngineDriver:
    width = _core.Backend(device, threads=2 if device == "cpu" else 0).width
    schedule = built_in_schedule("sequential", width)
    engine = load_engine(
        model,
        schedule,
        dtype="bfloat16",
        device=device,
        threads=2,
        host_slots=SLOTS,
        jitter_us=jitter_us,
    )
    return EngineDriver(engine)


def random_tokens(seed: int, count: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 160, count).tolist()
    return tokens


def logits_of(driver: EngineDriver, sequence: Sequence) -> NDArray[np.float32]:
    rows = len(sequence.tokens) - sequence.computed
    logits = driver.step([[Chunk(sequence, rows)]]).logits
    assert logits is not None
    return logits


def overwrite(driver: EngineDriver) -> Sequence:
    """A step without a wait that writes what few pages are left."""
    other = driver.add(random_tokens(9, 40))
    driver.engine.submit(driver.batch([[Chunk(other, 40)]]))
    return other


@pytest.mark.parametrize("jitter_us", [0, 3000])
@pytest.mark.parametrize("device", DEVICES)
def test_a_sequence_goes_on_from_pages_that_were_away(
    model: Path, device: str, jitter_us: int
) -> None:
    """Nothing is waited for but what the next step waits for by itself."""
    tokens = random_tokens(1, PAGES * PAGE_SIZE + 1)
    driver = make_driver(model, device, jitter_us)
    stayed = driver.add(tokens)
    expected = logits_of(driver, stayed)

    moved = driver.add(tokens[:-1])
    step = driver.engine.submit(driver.batch([[Chunk(moved, PAGES * PAGE_SIZE)]]))
    slots = np.array([7, 2, 9, 0, 11], np.int32)
    stored = driver.engine.store_pages(moved.pages, slots)
    assert stored.wait() > 0 and step.is_done()
    driver.release(moved)
    other = overwrite(driver)
    assert set(other.pages) & set(moved.pages) == set()
    moved = Sequence(tokens, stayed.slot)
    moved.pages = [driver._free_pages.pop() for _ in range(PAGES)]
    moved.computed = PAGES * PAGE_SIZE
    loaded = driver.engine.load_pages(moved.pages, slots)
    found = logits_of(driver, moved)
    assert loaded.is_done()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_slot_holds_all_layers_of_its_page(model: Path, device: str) -> None:
    """What a slot holds is what its page held, wherever it is loaded to."""
    driver = make_driver(model, device)
    sequence = driver.add(random_tokens(2, 3 * PAGE_SIZE))
    logits_of(driver, sequence)
    engine, pool = driver.engine, driver.engine.host_pool
    assert pool.shape[0] == SLOTS and pool.shape[1] % 4096 == 0
    assert pool.ctypes.data % 4096 == 0
    pool[:] = 0
    engine.store_pages(sequence.pages, [4, 5, 6]).wait()
    page_bytes = 3 * 2 * 2 * PAGE_SIZE * 64 * 2  # layers, K/V, heads, tokens, head_dim, bfloat16
    held = pool[4:7, :page_bytes].copy()
    assert np.all(np.count_nonzero(held.reshape(3, 3 * 2 * 2, -1), axis=2) > 200)
    assert len(np.unique(held, axis=0)) == 3
    assert not pool[[0, 1, 2, 3, 7, 8]].any() and not pool[4:7, page_bytes:].any()
    engine.load_pages([driver._free_pages[0]], [5]).wait()
    engine.store_pages([driver._free_pages[0]], [8]).wait()
    np.testing.assert_array_equal(pool[8], pool[5])


def test_copies_that_cannot_be_are_refused(model: Path) -> None:
    engine = make_driver(model, "cpu", jitter_us=20000).engine
    pages = engine.config.num_pages
    for bad_pages, bad_slots, message in (
        ([1, pages], [0, 1], rf"pages\[1\] is {pages} but must be below {pages}"),
        ([0, 1], [0, -1], r"slots\[1\] is -1"),
        ([0, 1], [3, 3], r"slots\[1\] is 3, which stands there before"),
        ([0, 1], [3], "there are 2 pages and 1 slots"),
        ([], [], "not none"),
    ):
        with pytest.raises(_core.EngineError, match=message):
            engine.store_pages(bad_pages, bad_slots)
    handles = [engine.store_pages([n], [n]) for n in range(8)]
    with pytest.raises(_core.EngineError, match="8 copies are in flight"):
        engine.store_pages([9], [9])
    engine.load_pages([9], [9]).wait()
    handles[-1].wait()
    engine.store_pages([9], [9]).wait()


@pytest.mark.parametrize("device", DEVICES)
def test_an_engine_ends_when_its_copies_have(model: Path, device: str) -> None:
    engine = make_driver(model, device, jitter_us=20000).engine
    handles = [engine.store_pages([n], [n]) for n in range(4)]
    handles += [engine.load_pages([n], [n]) for n in range(4, 8)]
    assert not handles[-1].is_done()
    del engine
    assert all(handle.is_done() for handle in handles)
    assert all(handle.wait() > 0 for handle in handles)


def test_an_engine_without_a_pool_says_so(model: Path) -> None:
    schedule = built_in_schedule("sequential", 2)
    engine = load_engine(model, schedule, threads=2)
    with pytest.raises(_core.EngineError, match="host_slots"):
        engine.store_pages([0], [0])
