"""Any valid schedule gives the bits of the sequential one, however rows are dealt to segments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine_driver import Chunk, EngineDriver, load_engine
from nanoflow import _core
from tiny_models import write_tiny_llama

LENGTHS = (5, 17, 1, 9, 30, 2, 12, 3)
DECODE_STEPS = 3
WIDTH = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"), num_layers=3)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(
        tmp_path_factory.mktemp("mixtral"), family="Mixtral", num_local_experts=6, num_layers=3
    )


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 100, length).tolist() for length in LENGTHS]


def run(
    engine: _core.Engine, deal: list[int], chunk_rows: int
) -> tuple[list[list[int]], list[NDArray[np.float32]]]:
    """Prefills all prompts in chunks, then decodes; `deal[i]` is the segment of request i."""
    driver = EngineDriver(engine)
    sequences = [driver.add(tokens) for tokens in prompts()]
    segments = len(engine.schedule.cuts()) + 1
    logits: list[list[NDArray[np.float32]]] = [[] for _ in sequences]
    while any(len(s.tokens) < n + DECODE_STEPS for s, n in zip(sequences, LENGTHS, strict=True)):
        step: list[list[Chunk]] = [[] for _ in range(segments)]
        sampled: list[list[int]] = [[] for _ in range(segments)]
        for i, s in enumerate(sequences):
            rows = min(chunk_rows, len(s.tokens) - s.computed)
            if len(s.tokens) == LENGTHS[i] + DECODE_STEPS:
                continue
            step[deal[i] % segments].append(Chunk(s, rows))
            if s.computed + rows == len(s.tokens):
                sampled[deal[i] % segments].append(i)
        result = driver.step(step)
        for row, i in enumerate(i for segment in sampled for i in segment):
            assert result.logits is not None
            logits[i].append(result.logits[row])
    return [s.tokens for s in sequences], [np.stack(rows) for rows in logits]


splits = st.lists(
    st.sampled_from([0.125, 0.25, 0.375, 0.5, 0.625, 0.75]), unique=True, max_size=3
).map(sorted)


@st.composite
def schedules(draw: st.DrawFn) -> _core.Schedule:
    """Random lanes, splits and orders; orders that the planner refuses are drawn again."""
    lanes = [_core.LaneSpec(name, 1) for name in draw(st.sampled_from(["a", "ab", "abc"]))]
    names = [lane.name for lane in lanes]
    stages = {}
    for name in ("qkv", "attn", "o", "mlp"):
        split = draw(splits)
        number = draw(st.sampled_from([1, len(split) + 1]))
        lane = draw(st.lists(st.sampled_from(names), min_size=number, max_size=number))
        in_turn = draw(st.sampled_from([False, False, True]))
        stages[name] = _core.StageSpec(split, lane, in_turn=in_turn)
    stages["head"] = _core.StageSpec([], draw(st.sampled_from(names)))
    parts = {name: [f"{name}.{i}" for i in range(len(s.split) + 1)] for name, s in stages.items()}
    kind = draw(st.sampled_from(["stages in turn", "shuffled parts", "next layer early"]))
    order: list[str] = []
    if kind != "stages in turn":
        suffix = "@+1" if kind == "next layer early" else ""
        groups = [parts["qkv"], parts["attn"], parts["o"], parts["mlp"]]
        if suffix:  # qkv of the next layer at the end of the period, attention right after it
            groups = [parts["o"], parts["mlp"], [part + suffix for part in parts["qkv"]]]
        for group in groups:
            order += draw(st.permutations(group))
    return _core.Schedule("drawn", lanes, stages, order)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    schedule=schedules(),
    deal=st.lists(st.integers(0, 8), min_size=len(LENGTHS), max_size=len(LENGTHS)),
    chunk_rows=st.sampled_from([3, 8, 64]),
    jitter_us=st.sampled_from([0, 50]),
    row_granularity=st.sampled_from([1, 4, 16]),
)
@pytest.mark.parametrize(
    ("dtype", "is_mixture"), [("float32", False), ("bfloat16", False), ("bfloat16", True)]
)
def test_any_schedule_gives_the_same_bits(
    model: Path,
    mixture: Path,
    dtype: str,
    is_mixture: bool,
    schedule: _core.Schedule,
    deal: list[int],
    chunk_rows: int,
    jitter_us: int,
    row_granularity: int,
) -> None:
    sequential = _core.Schedule("sequential", [_core.LaneSpec("all", WIDTH)])
    model = mixture if is_mixture else model
    engine = load_engine(model, sequential, dtype=dtype)
    tokens, logits = run(engine, [0] * len(LENGTHS), 64)
    drawn = load_engine(
        model, schedule, dtype=dtype, jitter_us=jitter_us, row_granularity=row_granularity
    )
    segments = len(schedule.cuts()) + 1
    assert all(plan.validate(WIDTH) == [] for plan in drawn.plans([8] * segments, 4))
    drawn_tokens, drawn_logits = run(drawn, deal, chunk_rows)
    assert drawn_tokens == tokens
    for got, expected in zip(drawn_logits, logits, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_ping_pong_has_attention_beside_other_stages(model: Path) -> None:
    schedule = _core.Schedule(
        "pingpong",
        [_core.LaneSpec("compute", 2), _core.LaneSpec("memory", 1)],
        {
            "qkv": _core.StageSpec([0.5], "compute"),
            "attn": _core.StageSpec([0.5], "memory"),
            "o": _core.StageSpec([0.5], "compute"),
            "mlp": _core.StageSpec([0.5], "compute"),
        },
        ["o.0", "mlp.0", "qkv.0@+1", "o.1", "mlp.1", "qkv.1@+1"],
    )
    engine = load_engine(model, schedule)
    lines = [line for plan in engine.plans([8, 8], 2) for line in repr(plan).splitlines()[2:]]
    attention = [line for line in lines if " attention " in line]
    assert attention
    assert all(" memory " in line for line in attention)
    others = [line for line in lines if line not in attention]
    assert all(" compute " in line for line in others)


def test_a_schedule_that_reads_before_it_writes_is_refused(model: Path) -> None:
    schedule = _core.Schedule(
        "wrong", [_core.LaneSpec("all", 1)], {}, ["qkv.0", "o.0", "mlp.0", "attn.0"]
    )
    with pytest.raises(_core.EngineError, match="issued before attention of layer 0"):
        load_engine(model, schedule)
