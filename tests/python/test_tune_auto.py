"""schedule="auto": where schedules come from, and that requests do not notice which one runs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from made_up_table import made_up_table
from nanoflow import LLM, SamplingParams
from nanoflow.config import EngineArgs
from nanoflow.schedule import built_in_schedule, schedule_to_json
from nanoflow.scheduler.choose import Mix
from nanoflow.tune import auto
from nanoflow.tune.auto import Choice, choose_schedules, full_loads, load_of
from nanoflow.tune.costs import Load
from nanoflow.tune.results import device_name, key_of, load_result, save_result
from nanoflow.tune.table import table_to_json
from test_tune_search import SHIPPED, llama_8b
from tiny_models import write_tiny_llama
from tried_schedules import NAMES, try_schedules

FULL, FEW = Mix(1024, 512, 512 * 768 + 512 * 256), Mix(8, 8, 8 * 768)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nanoflow" / "schedules"


def gpu(name: str, width: int = 132) -> Any:
    """As far as the choice looks at a backend."""
    description = f"cuda:0 ({name}, {width} SMs)"
    return SimpleNamespace(device="cuda:0", description=description, width=width)


def chosen(backend: Any, **arguments: Any) -> Choice:
    return choose_schedules(EngineArgs(model="m", **arguments), backend, llama_8b())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_known_gpu_starts_from_the_tables(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = chosen(gpu(name))
    ids = [schedule.id for schedule in found.schedules]
    assert "sequential" in ids and 3 <= len(ids) <= 6
    times = [found.predict(number, FULL) for number in range(len(ids))]
    assert min(times) > 0
    few = [found.predict(number, FEW) for number in range(len(ids))]
    assert ids[few.index(min(few))] == "sequential"
    monkeypatch.setattr(auto, "search", lambda *_: pytest.fail("the search is remembered"))
    assert chosen(gpu(name)).schedules == found.schedules
    (path,) = cache.glob("searched-*.json")
    assert name.split()[1].lower() in path.name
    path.write_text("{")
    with pytest.raises(pytest.fail.Exception):
        chosen(gpu(name))


def test_what_was_tuned_goes_first() -> None:
    backend, spec = gpu("made up"), llama_8b()
    key = key_of(backend, spec)
    rates = {"overlap": 20.0, "nano": 30.0, "sequential": 10.0}
    measured = [
        {"schedule": schedule_to_json(built_in_schedule(name, 132)), "tokens_per_second": rate}
        for name, rate in rates.items()
    ]
    table = made_up_table(width=132, width_step=8)
    save_result(key.path("tuned"), key, {"table": table_to_json(table), "measured": measured})
    found = choose_schedules(EngineArgs(model="m"), backend, spec)
    ids = [schedule.id for schedule in found.schedules]
    assert ids[:3] == ["nano", "overlap", "sequential"]
    assert len(set(ids)) == len(ids) > 3  # and what its op times say for other loads
    assert found.predict(2, FULL) > 0
    newer = dataclasses.replace(key, version="next")
    assert load_result(key.path("tuned"), newer) is None
    assert newer.path("tuned") != key.path("tuned")


NOT_INSTALLED = """
from importlib import metadata

known = metadata.version

def version(name):
    if name == "nanoflow":
        raise metadata.PackageNotFoundError(name)
    return known(name)

metadata.version = version

from test_tune_auto import chosen, gpu

print(*(schedule.id for schedule in chosen(gpu("NVIDIA Unheard-of")).schedules))
"""


def test_a_checkout_that_is_not_installed_chooses_too() -> None:
    command = [sys.executable, "-c", NOT_INSTALLED]
    ended = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ended.stdout.split() == ["sequential", "overlap"], ended.stderr


def test_an_unknown_gpu_tries_the_built_in_overlap_with_many_rows() -> None:
    found = chosen(gpu("NVIDIA Unheard-of", 100))
    assert [schedule.id for schedule in found.schedules] == ["sequential", "overlap"]
    chooser = found.chooser(64)
    assert chooser is not None
    for _ in range(100):
        number = chooser.choose(FEW)
        chooser.observe(number, FEW, 1.0)
        assert number == 0
    tried = set()
    for _ in range(100):
        tried.add(number := chooser.choose(FULL))
        chooser.observe(number, FULL, 1.0)
    assert tried == {0, 1}


@pytest.mark.parametrize(
    ("backend", "arguments", "name"),
    [
        (SimpleNamespace(device="cpu", description="cpu", width=8), {}, "sequential"),
        (gpu(SHIPPED[0]), {"schedule": "overlap"}, "overlap"),
        (SimpleNamespace(device="cpu", description="cpu", width=8), {"schedule": "nano"}, "nano"),
    ],
)
def test_one_schedule_needs_no_chooser(backend: Any, arguments: dict[str, Any], name: str) -> None:
    found = chosen(backend, **arguments)
    assert [schedule.id for schedule in found.schedules] == [name]
    assert found.chooser(8) is None


def test_two_threads_try_a_half_each_for_many_rows() -> None:
    cpu = SimpleNamespace(device="cpu", description="cpu (2 threads)", width=2)
    found = chosen(cpu)
    assert [schedule.id for schedule in found.schedules] == ["sequential", "overlap"]
    chooser = found.chooser(64)
    assert chooser is not None
    tried: dict[int, set[int]] = {rows: set() for rows in (32, 64)}
    for rows, numbers in tried.items():
        mix = Mix(rows, rows, 128 * rows)
        for _ in range(100):
            numbers.add(number := chooser.choose(mix))
            chooser.observe(number, mix, 1.0)
    assert tried == {32: {0}, 64: {0, 1}}


def test_names_of_devices() -> None:
    assert device_name(gpu(SHIPPED[0])) == SHIPPED[0]
    cpu: Any = SimpleNamespace(device="cpu", description="cpu (2 threads, amx)")
    assert device_name(cpu) == "cpu (2 threads, amx)"


def test_loads() -> None:
    assert full_loads(EngineArgs(model="m")) == [
        Load(512, 768, 512, 256),
        Load(512, 1024, 256, 256),
        Load(512, 1280, 1024, 512),
    ]
    small = EngineArgs(model="m", max_num_seqs=96, max_num_batched_tokens=128)
    assert full_loads(small)[0] == Load(64, 768, 64, 256)
    assert full_loads(small)[2] == Load(42, 1280, 84, 512)
    assert load_of(Mix(100, 100, 50_000)) == Load(100, 500, 0, 1)
    assert load_of(Mix(300, 100, 40_400)) == Load(100, 400, 200, 100)


def test_an_llm_that_tries_schedules_gives_the_tokens_of_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_llama(tmp_path, num_layers=2)
    prompts = [{"prompt_token_ids": list(range(2, 5 + i))} for i in range(12)]
    sampling = SamplingParams(max_tokens=24, temperature=0.8, seed=5, ignore_eos=True)

    def tokens(**arguments: Any) -> list[list[int]]:
        with LLM(model, skip_tokenizer_init=True, device="cpu", cpu_threads=4, **arguments) as llm:
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

    expected = tokens()
    tried = try_schedules(monkeypatch)
    assert tokens() == expected
    assert set(tried) == set(NAMES)
