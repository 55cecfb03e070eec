"""LLM.set_schedule: a running engine goes on with another schedule."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import pytest

from nanoflow import LLM, EngineError, SamplingParams, _core
from nanoflow.metrics import counted_by
from nanoflow.scheduler.stats import StepStats

PARAMS = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
PROMPTS = [[1, 2, 3 + i] for i in range(6)]


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_requests_go_on_with_another_schedule(model: Path) -> None:
    steps: list[StepStats] = []
    with LLM(model, schedule="sequential", max_model_len=64) as llm:
        expected = tokens(llm)
        llm.step_listener = steps.append
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(tokens, llm)
            for schedule in cycle(["overlap", "nano", "sequential"]):
                llm.set_schedule(schedule)
                if run.done():
                    break
        assert run.result() == expected
        assert len(steps) >= 50


def test_auto_goes_on_after_another_schedule(model: Path) -> None:
    with LLM(model, max_model_len=64, cpu_threads=2) as llm:  # schedule="auto"
        expected = tokens(llm)
        for schedule in ("nano", "auto"):
            before = sum(steps_of(llm).values())
            llm.set_schedule(schedule)
            assert tokens(llm) == expected
            assert (sum(steps_of(llm).values()) > before) == (schedule == "auto")


def steps_of(llm: LLM) -> dict[str, float]:
    """That were chosen."""
    return counted_by("schedule", "nanoflow:steps", llm.get_metrics())


def test_an_error_does_not_keep_the_engine(model: Path) -> None:
    gc.disable()
    try:
        with LLM(model, max_model_len=64) as llm:
            with pytest.raises(EngineError):
                llm.set_schedule(_core.Schedule("lost", [_core.LaneSpec("all", 4096)]))
            state = weakref.ref(llm._runtime.state)
        del llm
        assert state() is None
    finally:
        gc.enable()


def test_a_schedule_that_does_not_fit_changes_nothing(model: Path) -> None:
    with LLM(model, schedule="overlap", max_model_len=64, cpu_threads=2) as llm:
        expected = tokens(llm)
        with pytest.raises(ValueError, match="schedule 'best' is unknown"):
            llm.set_schedule("best")
        with pytest.raises(ValueError, match="'auto' is chosen by an LLM"):
            llm.set_schedule("auto")
        stages = {"mlp": _core.StageSpec(lane="nowhere")}
        with pytest.raises(EngineError, match="nowhere"):
            llm.set_schedule(_core.Schedule("lost", [_core.LaneSpec("all", 2)], stages))
        assert tokens(llm) == expected
    with pytest.raises(EngineError, match="the engine has been closed"):
        llm.set_schedule("nano")
