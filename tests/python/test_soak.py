"""The soak test's script, for a short while."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import gpu_memory
from conftest import has_cuda
from gpu_memory import OF_DEVICE, OF_PROCESS, GpuMemory
from nanoflow import _core
from nanoflow.errors import EngineError
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
    assert found["gpu_bytes"] is None and found["gpu_bytes_are"] is None


def test_a_soak_in_which_nothing_is_aborted_fails(
    soak: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "ABORT_SHARE", 0.0)
    monkeypatch.setattr(soak, "MOST_DRIFT", 0.5)
    monkeypatch.setattr(soak, "PATIENCE", 3)
    assert soak.main(["--model", "tiny", "--steps", "10"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"soak: \d{2,} steps saw \d+ preemptions and 0 aborts", error), error


def watch(soak: ModuleType, runtime: Any = None) -> Any:
    readings = [soak.Reading(step, 0, None) for step in range(8)]
    return soak.Watch(runtime, None, 1, readings)


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


class FakeNvml:
    """Knows processes and what they hold."""

    class NVMLError(Exception):
        pass

    def __init__(self, **held: Any) -> None:
        self.held = {os.getpid() if name == "own" else 1: used for name, used in held.items()}

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        if bus_id != "0000:3B:00.0":
            raise self.NVMLError("no such board")
        return bus_id

    def nvmlDeviceGetComputeRunningProcesses(self, board: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.held.items()]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What stands for a GPU with 1,000 bytes free."""
    gpu = SimpleNamespace(free_memory=1000)
    monkeypatch.setattr(gpu_memory, "_core", SimpleNamespace(Backend=lambda name: gpu))
    monkeypatch.setattr(
        _core, "cuda_bus_id", lambda index: f"0000:{'3B' if not index else 99}:00.0"
    )
    return gpu


def test_memory_of_a_shared_gpu_is_that_of_this_process(
    device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNvml(own=300, other=500)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    memory = GpuMemory("cuda")
    device.free_memory -= 77  # another process takes some
    assert (memory.source, memory.used()) == (OF_PROCESS, 300)
    nvml.held[os.getpid()] = 340
    assert memory.used() == 340
    del nvml.held[os.getpid()]
    with pytest.raises(EngineError, match=f"process {os.getpid()}"):
        memory.used()


@pytest.mark.parametrize(
    ("nvml", "name"),
    [(None, "cuda"), (FakeNvml(other=500), "cuda"), (FakeNvml(own=None), "cuda"),
     (FakeNvml(own=300), "cuda:1")],
    ids=["no NVML", "process not known", "NVML does not say", "board not known"],
)  # fmt: skip
def test_where_nvml_knows_no_more_it_is_what_the_device_has_lost(
    device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, nvml: Any, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    memory = GpuMemory(name)
    device.free_memory -= 77
    assert (memory.source, memory.used()) == (OF_DEVICE, 77)


@pytest.mark.skipif(not has_cuda(), reason="no GPU that nanoflow can use")
def test_nvml_says_what_a_real_gpu_holds_for_this_process() -> None:
    memory = GpuMemory("cuda")
    if memory.source == OF_DEVICE:
        pytest.skip("NVML does not know this process")
    assert memory.used() > 2**20, "a context takes more"
