"""Whole steps on a GPU beside the CPU's: every op as the engine runs it, small and without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import has_cuda
from dummy_models import SHAPES, write_config
from engine_driver import Chunk, EngineDriver, load_engine
from nanoflow import _core
from nanoflow.schedule import built_in_schedule

pytestmark = [
    pytest.mark.skipif(not has_cuda(), reason="no GPU that nanoflow can use"),
    pytest.mark.sanitizer,
]

LENGTHS = (1, 5, 33, 70, 16, 17)
DECODES = 3


def logits_of(model: Path, device: str, dtype: str, schedule: str) -> NDArray[np.float32]:
    """Logits [all positions, V]: prompts in chunks of 24 rows beside decodes of earlier ones."""
    width = _core.Backend(device, threads=2 if device == "cpu" else 0).width
    engine = load_engine(
        model,
        built_in_schedule(schedule, width),
        dtype=dtype,
        device=device,
        threads=2,
        load_format="dummy",
    )
    driver = EngineDriver(engine)
    rng = np.random.default_rng(2)
    sequences = [driver.add(rng.integers(0, 160, n + DECODES).tolist()) for n in LENGTHS]
    segments = len(engine.schedule.cuts()) + 1
    rows_of: list[list[NDArray[np.float32]]] = [[] for _ in sequences]
    while any(s.computed < len(s.tokens) for s in sequences):
        step: list[list[Chunk]] = [[] for _ in range(segments)]
        order: list[list[int]] = [[] for _ in range(segments)]
        for i, (s, length) in enumerate(zip(sequences, LENGTHS, strict=True)):
            if s.computed == len(s.tokens):
                continue
            rows = min(24, length - s.computed) if s.computed < length else 1
            step[i % segments].append(Chunk(s, rows, all_logits=True))
            order[i % segments].append(i)
        result = driver.step(step)
        assert result.logits is not None
        first = 0
        for i, chunk in zip(sum(order, []), sum(step, []), strict=True):
            rows_of[i].append(result.logits[first : first + chunk.rows])
            first += chunk.rows
    return np.concatenate([rows for parts in rows_of for rows in parts])


@pytest.mark.parametrize("schedule", ["sequential", "overlap"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_the_cpu(tmp_path: Path, shape: str, dtype: str, schedule: str) -> None:
    model = write_config(tmp_path, **SHAPES[shape])
    exact = logits_of(model, "cpu", "float32", "sequential")
    on_cpu = logits_of(model, "cpu", dtype, "sequential")
    on_gpu = logits_of(model, "cuda", dtype, schedule)

    def error(logits: NDArray[np.float32]) -> float:
        return float(np.sqrt(np.mean((logits - exact) ** 2)))

    assert exact.std() > 0.1
    assert error(on_gpu) <= 1.3 * error(on_cpu)
