"""The soak test's script, for a short while."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from test_docs import ROOT, load


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    return load(ROOT / "bench" / "soak.py")


def test_a_short_soak_leaks_nothing(
    soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "CHECK_EVERY", 10)
    monkeypatch.setattr(soak, "NUM_PAGES", 48)
    monkeypatch.setattr(soak, "ABORT_SHARE", 0.2)
    monkeypatch.setattr(soak, "MOST_DRIFT", 0.5)  # 200 steps say nothing of memory
    path = tmp_path / "soak.json"
    arguments = ["--model", "tiny", "--steps", "200", "--output-json", str(path)]
    assert soak.main(arguments) == 0
    found = json.loads(path.read_text())
    assert found["steps"] >= 200
    assert found["preemptions"] > 0
    assert set(found["ends"]) == {"length", "stop", "abort"}
    assert found["process_bytes"]["after_warm_up"] > 0
    assert found["gpu_bytes"] is None


def watch(soak: ModuleType, runtime: Any = None) -> Any:
    readings = [soak.Reading(step, 0, None) for step in range(8)]
    return soak.Watch(runtime, None, 0, 1, readings)


def test_growing_memory_is_found(soak: ModuleType) -> None:
    steady = [1000, 2000, 3000, 3000, 3010, 3000, 3029, 3005]
    found = {"after_warm_up": 3000, "most": 3029, "last": 3005}
    assert soak.drift("GPU", watch(soak), steady) == found
    with pytest.raises(soak.SoakError, match="GPU grew from 3000 bytes after 2 steps to 3031"):
        soak.drift("GPU", watch(soak), [*steady[:-1], 3031])


def test_a_request_that_is_forgotten_is_found(soak: ModuleType) -> None:
    options = soak.argparse.Namespace(
        device="cpu", model="tiny", steps=50, schedule="sequential", seed=0
    )
    runtime = soak.start(options).runtime
    runtime.loop.close()
    soak.check_all_is_free(runtime, 0)
    runtime.state.pages.grant(3)
    with pytest.raises((soak.SoakError, AssertionError), match="pages"):
        soak.check_all_is_free(runtime, 0)
