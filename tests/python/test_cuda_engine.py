"""The engine on a GPU: its logits against the CPU's, with decodes, chunks, lanes and delays."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import nanoflow
from conftest import has_cuda
from engine_driver import Chunk, EngineDriver, load_engine
from nanoflow import _core
from nanoflow.schedule import built_in_schedule
from random_models import SHAPES, write_config

pytestmark = pytest.mark.skipif(not has_cuda(), reason="no GPU that nanoflow can use")

Logits = NDArray[np.float32]

LENGTHS = (5, 70, 1, 33, 64, 2, 90, 3)
ALONE = [_core.LaneSpec("all", 132)]
STAGES = {
    "qkv": _core.StageSpec([0.5], "compute"),
    "attn": _core.StageSpec([0.5], "memory"),
    "o": _core.StageSpec([0.5], "compute"),
    "mlp": _core.StageSpec([0.5], "compute"),
    "head": _core.StageSpec([], "compute"),
}
PING_PONG = ["o.0", "mlp.0", "qkv.0@+1", "o.1", "mlp.1", "qkv.1@+1"]
SCHEDULES = {
    "sequential": _core.Schedule("sequential", ALONE),
    "narrow": _core.Schedule("narrow", [_core.LaneSpec("all", 24)]),
    "partitioned": _core.Schedule(
        "partitioned",
        [_core.LaneSpec("compute", 108), _core.LaneSpec("memory", 24)],
        STAGES,
        PING_PONG,
    ),
}
DTYPES = ("bfloat16", "float16")


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp(request.param), **SHAPES[request.param])


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 160, length).tolist() for length in LENGTHS]


def logits_of(engine: _core.Engine, chunk_rows: int) -> list[Logits]:
    """Logits [length, V] of every prompt, fed in chunks: the last ones are like decodes."""
    driver = EngineDriver(engine)
    sequences = [driver.add(tokens) for tokens in prompts()]
    segments = len(engine.schedule.cuts()) + 1
    logits: list[list[Logits]] = [[] for _ in sequences]
    while any(s.computed < len(s.tokens) for s in sequences):
        step: list[list[Chunk]] = [[] for _ in range(segments)]
        order: list[list[int]] = [[] for _ in range(segments)]
        for i, s in enumerate(sequences):
            rows = min(chunk_rows, len(s.tokens) - s.computed)
            if rows > 0:
                step[i % segments].append(Chunk(s, rows, all_logits=True))
                order[i % segments].append(i)
        result = driver.step(step)
        assert result.logits is not None
        first = 0
        for i, chunk in zip(chain(*order), chain(*step), strict=True):
            logits[i].append(result.logits[first : first + chunk.rows])
            first += chunk.rows
    return [np.concatenate(parts) for parts in logits]


def error(a: list[Logits], b: list[Logits]) -> float:
    """Of a usual row: one that lies between two experts may go to either, and end elsewhere."""
    squares = np.mean((np.concatenate(a) - np.concatenate(b)) ** 2, axis=1)
    return float(np.sqrt(np.median(squares)))


def make_engine(
    model: Path,
    schedule: _core.Schedule,
    dtype: str,
    device: str,
    jitter_us: int = 0,
    enforce_eager: bool = False,
) -> _core.Engine:
    return load_engine(
        model,
        schedule,
        dtype=dtype,
        device=device,
        max_seqs=sum(LENGTHS),
        page_size=16 if device == "cuda" else 4,  # smaller ones take other ways on a GPU
        jitter_us=jitter_us,
        enforce_eager=enforce_eager,
        random_weights=True,
    )


def on_cpu(model: Path, dtype: str) -> list[Logits]:
    schedule = _core.Schedule("cpu", [_core.LaneSpec("all", 2)])
    return logits_of(make_engine(model, schedule, dtype, "cpu"), max(LENGTHS))


@pytest.fixture(scope="module")
def exact(model: Path) -> list[Logits]:
    return on_cpu(model, "float32")


@pytest.fixture(scope="module")
def cpu_error(model: Path, exact: list[Logits]) -> dict[str, float]:
    return {dtype: error(on_cpu(model, dtype), exact) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "chunk_rows"),
    [
        ("sequential", 1),
        ("sequential", 100),
        pytest.param("sequential", 17, marks=pytest.mark.sanitizer),
        ("narrow", 17),
        ("partitioned", 1),
        ("partitioned", 100),
        pytest.param("partitioned", 17, marks=pytest.mark.sanitizer),
    ],
)
def test_logits_are_as_good_as_the_cpus(
    model: Path,
    exact: list[Logits],
    cpu_error: dict[str, float],
    dtype: str,
    name: str,
    chunk_rows: int,
) -> None:
    """No farther from float32 than the CPU's in the same dtype, but for chance."""
    actual = logits_of(make_engine(model, SCHEDULES[name], dtype, "cuda"), chunk_rows)
    assert np.concatenate(exact).std() > 0.5
    assert error(actual, exact) <= 1.3 * cpu_error[dtype]


def test_delays_change_no_bit(model: Path) -> None:
    """Random delays around every event, on lanes that run side by side."""
    plain, delayed = (
        logits_of(make_engine(model, SCHEDULES["partitioned"], "bfloat16", "cuda", jitter_us), 17)
        for jitter_us in (0, 100)
    )
    for got, expected in zip(delayed, plain, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("jitter_us", [0, 50])
@pytest.mark.parametrize("chunk_rows", [1, 17])
@pytest.mark.parametrize("name", ["sequential", "nano", "partitioned"])
def test_replayed_graphs_change_no_bit(
    model: Path, name: str, chunk_rows: int, jitter_us: int
) -> None:
    """Few graphs serve steps of ever other requests, lengths and pages; delays are replayed too."""
    schedule = SCHEDULES.get(name) or built_in_schedule(name, 132)
    eager, replayed = (
        make_engine(model, schedule, "bfloat16", "cuda", jitter_us, enforce_eager)
        for enforce_eager in (True, False)
    )
    expected = logits_of(eager, chunk_rows)
    for got, logits in zip(logits_of(replayed, chunk_rows), expected, strict=True):
        np.testing.assert_array_equal(got, logits)
    assert eager.graph_stats().count == 0
    assert 2 <= replayed.graph_stats().count <= 12
    assert replayed.graph_stats().seconds > 0


def check_eager_steps_give_the_same(model: Path, schedule: str, **options: Any) -> None:
    """Two steps at a time, requests that come and go, and pages that run out."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 160, length).tolist() for length in rng.integers(1, 90, 40)]
    params = nanoflow.SamplingParams(max_tokens=30, temperature=1.0, seed=3, ignore_eos=True)
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "max_model_len": 128}
    pages = {"block_size": 16, "num_gpu_blocks_override": 40}
    options = {"device": "cuda", "load_format": "dummy"} | sizes | pages | options
    tokens: list[list[list[int]]] = []
    for enforce_eager in (True, False):
        with nanoflow.LLM(
            model,
            schedule=schedule,
            enforce_eager=enforce_eager,
            skip_tokenizer_init=True,
            **options,
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            tokens.append([list(output.outputs[0].token_ids) for output in outputs])
    assert tokens[0] == tokens[1]
    assert len({token for request in tokens[0] for token in request}) > 20


@pytest.mark.parametrize("name", ["sequential", "nano", "overlap"])
def test_steps_in_flight_replay_one_graph(model: Path, name: str) -> None:
    check_eager_steps_give_the_same(model, name)


def test_a_step_is_timed_by_the_device(model: Path) -> None:
    engine = make_engine(model, SCHEDULES["partitioned"], "bfloat16", "cuda")
    driver = EngineDriver(engine)
    sequences = [driver.add(tokens) for tokens in prompts()[:2]]
    batch = driver.batch([[Chunk(s, len(s.tokens))] for s in sequences], want_timings=True)
    timings = engine.submit(batch).wait().timings
    assert {timing.lane for timing in timings} == {"compute", "memory"}
    assert all(0 <= timing.begin_us <= timing.end_us < 1e6 for timing in timings)
    assert timings[-1].end_us > 0
