"""LLM.sleep and wake_up: the memory goes, the answers stay."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import DEVICES
from nanoflow import LLM, AsyncLLM, EngineError, RequestOutput, SamplingParams, _core
from nanoflow.metrics import Counter
from nanoflow.scheduler.stats import StepStats
from random_models import SHAPES, write_config
from tiny_models import write_tiny_llama

CACHE_BYTES = 256 << 20
SIZES: dict[str, Any] = {"max_model_len": 128, "block_size": 16}
PROMPTS = [list(range(3 + i, 60 + 7 * i)) for i in range(4)]
PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"), tokenizer=True)


def make_llm(model: Path, device: str, **arguments: Any) -> LLM:
    sizes = SIZES | {"kv_cache_memory_bytes": CACHE_BYTES, "skip_tokenizer_init": True}
    return LLM(model, device=device, **(sizes | arguments))


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def memory_reader(device: str) -> Callable[[], int]:
    """Bytes that are taken: of a GPU, or of this process's addresses (a CPU's are there before
    they are written to)."""
    if device == "cpu":
        pages = Path("/proc/self/statm")
        return lambda: int(pages.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    backend = _core.Backend("cuda")
    return lambda: backend.total_memory - backend.free_memory


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("schedule", ["sequential", "overlap"])
def test_the_memory_goes_and_the_answers_stay(
    tmp_path: Path, device: str, level: int, schedule: str
) -> None:
    write_config(tmp_path, **SHAPES["llama3-d64"])
    with make_llm(tmp_path, device, load_format="dummy", schedule=schedule) as llm:
        expected, before = tokens(llm), llm.memory
        assert tokens(llm) == expected  # on a GPU by graphs
        gc.collect()  # what other tests have left
        taken = memory_reader(device)
        shared = device == "cuda" and "PYTEST_XDIST_WORKER" in os.environ  # by other tests
        awake = taken()
        assert before.kv_cache > CACHE_BYTES * 0.9
        for _ in range(2):
            llm.sleep(level)
            assert llm.is_sleeping()
            if not shared:
                assert awake - taken() > 0.95 * before.kv_cache
            left = before.weights if (device, level) == ("cpu", 1) else 0
            assert (llm.memory.weights, llm.memory.kv_cache) == (left, 0)
            llm.wake_up()
            assert not llm.is_sleeping()
            assert llm.memory == before
            assert tokens(llm) == expected
            if not shared:
                assert taken() > awake - 0.05 * before.kv_cache


@pytest.mark.parametrize("ranks", [1, 2])
def test_only_level_2_reads_the_model_again(checkpoint: Path, tmp_path: Path, ranks: int) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    with make_llm(model, "cpu", tensor_parallel_size=ranks) as llm:
        expected = tokens(llm)
        llm.sleep(2)
        llm.wake_up()
        assert tokens(llm) == expected
        (model / "model.safetensors").rename(model / "away")
        llm.sleep(1)
        llm.wake_up()
        assert tokens(llm) == expected
        llm.sleep(2)
        with pytest.raises(FileNotFoundError):
            llm.wake_up()
        assert llm.is_sleeping()
        (model / "away").rename(model / "model.safetensors")
        llm.wake_up()
        assert tokens(llm) == expected


def test_tags_wake_up_one_after_the_other(checkpoint: Path) -> None:
    with make_llm(checkpoint, "cpu") as llm:
        expected, before = tokens(llm), llm.memory
        for first, second in (("weights", "kv_cache"), ("kv_cache", "weights")):
            llm.sleep()
            llm.wake_up(tags=[first])
            assert llm.is_sleeping()
            with pytest.raises(EngineError, match=r"asleep; call wake_up\(\) first"):
                tokens(llm)
            llm.wake_up(tags=[second])
            assert llm.memory == before
            assert tokens(llm) == expected


def test_prefixes_are_forgotten(checkpoint: Path) -> None:
    def hits() -> float:
        return next(
            metric.value
            for metric in llm.get_metrics()
            if isinstance(metric, Counter) and metric.name == "nanoflow:prefix_cache_hits"
        )

    with make_llm(checkpoint, "cpu") as llm:
        tokens(llm)
        assert hits() == 0
        tokens(llm)
        found = hits()
        assert found > 0
        llm.sleep()
        llm.wake_up()
        tokens(llm)
        assert hits() == found


def test_an_engine_with_open_requests_does_not_sleep(checkpoint: Path) -> None:
    long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, detokenize=False)
    with make_llm(checkpoint, "cpu") as llm:
        running = threading.Event()

        def slow_down(stats: StepStats) -> None:
            running.set()
            time.sleep(0.005)

        llm.step_listener = slow_down
        outputs: list[RequestOutput] = []
        user = threading.Thread(
            target=lambda: outputs.extend(llm.generate(PROMPTS[:2], long, use_tqdm=False))
        )
        user.start()
        running.wait()
        with pytest.raises(EngineError, match="requests are open; wait for them, or abort them"):
            llm.sleep()
        assert not llm.is_sleeping()
        user.join()
        assert [len(output.outputs[0].token_ids) for output in outputs] == [71, 65]
        llm.sleep()  # a step of theirs may still be in flight


def test_what_sleep_refuses(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with make_llm(checkpoint, "cpu", kv_offloading_size=0.01) as llm:
        with pytest.raises(EngineError, match="with kv_offloading_size cannot sleep"):
            llm.sleep()
        assert len(tokens(llm)) == len(PROMPTS)
    with make_llm(checkpoint, "cpu", enable_sleep_mode=True) as llm:
        with pytest.raises(ValueError, match="level=3 is unknown; 1 keeps the weights"):
            llm.sleep(3)
        with pytest.raises(ValueError, match="must be a list of 'weights' and 'kv_cache'"):
            llm.wake_up(tags=["graphs"])
        llm.wake_up()  # nothing sleeps
        llm.sleep()
        llm.sleep()
        assert caplog.messages[-1] == "the engine is asleep already"
        with pytest.raises(EngineError, match="the engine is asleep"):
            llm.set_schedule("nano")
    with pytest.raises(EngineError, match="the engine has been closed"):
        llm.sleep()


def test_streams_after_a_sleep(checkpoint: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    async def answer(engine: AsyncLLM) -> list[int]:
        last = None
        async for output in engine.generate("the quick", params, "one"):
            last = output
        assert last is not None
        return list(last.outputs[0].token_ids)

    async def run() -> None:
        engine = AsyncLLM(checkpoint, device="cpu", **SIZES)
        expected = await answer(engine)
        await engine.sleep()
        assert await engine.is_sleeping()
        assert engine.memory.kv_cache == 0
        with pytest.raises(EngineError, match="asleep"):
            await answer(engine)
        await engine.wake_up()
        assert not await engine.is_sleeping()
        assert await answer(engine) == expected
        engine.shutdown()

    asyncio.run(run())
