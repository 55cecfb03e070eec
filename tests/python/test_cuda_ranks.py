"""Ranks on GPUs: collectives through NCCL, and models that two GPUs share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import nanoflow
from conftest import SMALL_CACHE, TOLERANCES, has_cuda
from engine_driver import load_engine
from nanoflow import _core
from nanoflow.devices import find_nccl
from nanoflow.schedule import built_in_schedule
from random_models import SHAPES, write_config
from reference import decode, encode
from test_cuda_engine import (
    LENGTHS,
    Logits,
    check_eager_steps_give_the_same,
    error,
    logits_of,
)

pytestmark = pytest.mark.skipif(not has_cuda(), reason="no GPU that nanoflow can use")


def ranks_problem(ranks: int) -> str:
    """Why there cannot be so many ranks here; empty where there can."""
    try:
        make_ranks(ranks)
    except _core.EngineError as problem:
        return str(problem)
    return ""


def make_ranks(ranks: int) -> list[_core.Backend]:
    return _core.make_backends("cuda", ranks, nccl_library=find_nccl(), nccl_alone=True)


@pytest.fixture(scope="module", params=[1, 2, 4])
def backends(request: pytest.FixtureRequest) -> list[_core.Backend]:
    if problem := ranks_problem(request.param):
        pytest.skip(problem)
    return make_ranks(request.param)


@pytest.fixture(scope="module")
def two_gpus() -> None:
    if problem := ranks_problem(2):
        pytest.skip(problem)


@pytest.fixture(scope="module", params=SHAPES)  # some have one KV head for all ranks
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp(request.param), **SHAPES[request.param])


def collect(
    op: str, backends: list[_core.Backend], operands: Callable[[int], dict[str, Any]], width: int
) -> None:
    with ThreadPoolExecutor(len(backends)) as pool:
        runs = [
            pool.submit(_core.run_op, op, backend, width, **operands(rank))
            for rank, backend in enumerate(backends)
        ]
        for one in runs:
            one.result()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("rows", "columns"), [(3, 40), (700, 1024)])
@pytest.mark.parametrize("width", [16, 0])
def test_an_all_reduce_is_a_sum(
    backends: list[_core.Backend], dtype: str, rows: int, columns: int, width: int
) -> None:
    rng = np.random.default_rng(rows)
    values = [encode(rng.standard_normal((rows, columns)), dtype) for _ in backends]
    expected = np.sum([decode(value) for value in values], axis=0)
    collect("all_reduce", backends, lambda rank: {"x": values[rank]}, width)
    for value in values:
        np.testing.assert_array_equal(value, values[0])  # the same bits on all
        TOLERANCES[dtype].check(value, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("columns", "spare"), [(64, 0), (24, 5), (7, 3)])
def test_an_all_gather_puts_columns_side_by_side(
    backends: list[_core.Backend], dtype: str, columns: int, spare: int
) -> None:
    rng = np.random.default_rng(columns)
    parts = [encode(rng.standard_normal((33, columns)), dtype) for _ in backends]
    expected = np.concatenate(parts, axis=1)[:, : len(parts) * columns - spare]
    outs = [np.zeros_like(expected) for _ in backends]
    collect("all_gather", backends, lambda rank: {"x": parts[rank], "out": outs[rank]}, 16)
    for out in outs:
        np.testing.assert_array_equal(out, expected)


def make_engine(
    model: Path, schedule: _core.Schedule, device: str, ranks: int, **options: Any
) -> _core.Engine:
    return load_engine(
        model,
        schedule,
        dtype=options.pop("dtype", "bfloat16"),
        device=device,
        max_seqs=sum(LENGTHS),
        random_weights=True,
        ranks=ranks,
        **options,
    )


def check_same(actual: list[Logits], expected: list[NDArray[np.float32]]) -> None:
    for got, logits in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(got, logits)


@pytest.mark.parametrize("name", ["sequential", "tp-overlap"])
@pytest.mark.parametrize("chunk_rows", [1, 17, 100])
def test_two_gpus_are_as_good_as_a_cpu(
    two_gpus: None, model: Path, name: str, chunk_rows: int
) -> None:
    """No farther from float32 than the CPU's bfloat16, but for chance and one more rounding."""
    cpu = _core.Schedule("cpu", [_core.LaneSpec("all", 2)])
    exact = logits_of(make_engine(model, cpu, "cpu", 1, dtype="float32"), 100)
    limit = 1.5 * error(logits_of(make_engine(model, cpu, "cpu", 1), 100), exact)
    schedule = built_in_schedule(name, 132)
    assert error(logits_of(make_engine(model, schedule, "cuda", 2), chunk_rows), exact) <= limit


@pytest.mark.parametrize("name", ["sequential", "tp-overlap"])
def test_graphs_and_delays_change_no_bit(two_gpus: None, model: Path, name: str) -> None:
    schedule = built_in_schedule(name, 132)
    expected = logits_of(make_engine(model, schedule, "cuda", 2, enforce_eager=True), 17)
    check_same(logits_of(make_engine(model, schedule, "cuda", 2), 17), expected)
    for enforce_eager in (True, False):
        delayed = make_engine(
            model, schedule, "cuda", 2, jitter_us=100, enforce_eager=enforce_eager
        )
        check_same(logits_of(delayed, 17), expected)


@pytest.mark.parametrize("schedule", ["sequential", "overlap", "tp-overlap"])
def test_an_llm_on_two_gpus(two_gpus: None, model: Path, schedule: str) -> None:
    check_eager_steps_give_the_same(model, schedule, tensor_parallel_size=2)


def test_fewer_gpus_than_ranks() -> None:
    with pytest.raises(
        _core.EngineError, match="tensor_parallel_size 64 needs 64 GPUs from cuda:0 on"
    ):
        _core.make_backends("cuda", 64)


def test_no_nccl() -> None:
    with pytest.raises(_core.EngineError, match=r"needs NCCL, but .*; pip install nvidia-nccl"):
        _core.make_backends("cuda", 1, nccl_library="/nowhere/libnccl.so.2", nccl_alone=True)


@pytest.mark.parametrize("schedule", ["sequential", "tp-overlap"])
def test_one_rank_of_four_alone(tmp_path: Path, schedule: str) -> None:
    write_config(tmp_path, **SHAPES["llama2-d128"])
    params = nanoflow.SamplingParams(max_tokens=20, ignore_eos=True)
    with nanoflow.LLM(
        tmp_path,
        load_format="dummy",
        device="cuda",
        simulated_tensor_parallel_size=4,
        skip_tokenizer_init=True,
        schedule=schedule,
        max_model_len=128,
        kv_cache_memory_bytes=SMALL_CACHE,
    ) as llm:
        outputs = llm.generate([[1, 2, 3]] * 9, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20] * 9
