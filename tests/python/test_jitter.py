"""Random delays around every event of a whole LLM change no token: nothing works by being fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import DEVICES
from nanoflow import LLM, SamplingParams, _core
from nanoflow.scheduler.state import SchedulerState
from nanoflow.scheduler.step import Step
from tiny_models import write_tiny_llama

JITTER_US = {"cpu": 60, "cuda": 150}
REQUESTS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(
        tmp_path_factory.mktemp("llama"), num_layers=3, hidden_size=256, intermediate_size=384
    )


def prompts() -> list[dict[str, list[int]]]:
    """Half of them begin with the same two pages."""
    rng = np.random.default_rng(4)
    shared = rng.integers(0, 160, 32).tolist()
    return [
        {"prompt_token_ids": shared * (n % 2) + rng.integers(0, 160, 1 + 5 * n % 37).tolist()}
        for n in range(REQUESTS)
    ]


def params() -> list[SamplingParams]:
    """Greedy and drawn, with ends that nobody foresees."""
    return [
        SamplingParams(
            temperature=(0.0, 0.7, 1.0)[n % 3],
            top_k=(0, 20)[n % 2],
            top_p=(1.0, 0.9)[n // 2 % 2],
            seed=n,
            max_tokens=20 + n,
            stop_token_ids=[7 * n % 160],
            ignore_eos=True,
            detokenize=False,
        )
        for n in range(REQUESTS)
    ]


def generate(model: Path, device: str, schedule: str) -> list[list[int]]:
    """Tokens of all requests, on a cache that holds a third of what they want at once."""
    with LLM(
        model,
        device=device,
        dtype="bfloat16",
        schedule=schedule,
        cpu_threads=2 if device == "cpu" else 0,
        skip_tokenizer_init=True,
        block_size=16,
        num_gpu_blocks_override=16,
        max_model_len=128,
        max_num_seqs=12,
        max_num_batched_tokens=64,
    ) as llm:
        outputs = llm.generate(prompts(), params(), use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("schedule", ["sequential", "nano", "overlap"])
def test_delays_change_no_token(
    model: Path, device: str, schedule: str, blind: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted: list[int] = []
    start_step = SchedulerState.start_step

    def counting(state: SchedulerState) -> Step:
        step = start_step(state)
        preempted.extend(step.plan.preempted)
        return step

    monkeypatch.setattr(SchedulerState, "start_step", counting)
    expected = generate(model, device, schedule)
    assert len(preempted) > REQUESTS // 4
    assert len({tuple(tokens) for tokens in expected}) > REQUESTS // 2
    configs: list[_core.EngineConfig] = []
    make_config = _core.EngineConfig

    def delayed(**sizes: Any) -> _core.EngineConfig:
        configs.append(make_config(**sizes, jitter_us=JITTER_US[device]))
        return configs[-1]

    monkeypatch.setattr(_core, "EngineConfig", delayed)
    for _ in range(2):
        assert generate(model, device, schedule) == expected
    assert len(configs) == 2
