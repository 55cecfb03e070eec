"""Fixtures: backends by instruction set, dtypes and their tolerances, and a tiny model."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nanoflow import _core
from nanoflow.scheduler.forecast import Outlook
from nanoflow.tune.table import OpTable, shipped_table
from reference import DTYPES, decode


@dataclass(frozen=True)
class Tolerance:
    """How far an op's result may be from an oracle in float64, for values around 1."""

    rtol: float
    atol: float

    def check(self, actual: NDArray[Any], expected: NDArray[Any]) -> None:
        np.testing.assert_allclose(decode(actual), expected, rtol=self.rtol, atol=self.atol)


# Two units in the last place, and what cancels in sums of products of values around 1.
TOLERANCES = {
    "float32": Tolerance(rtol=3e-6, atol=2e-5),
    "bfloat16": Tolerance(rtol=1.6e-2, atol=1e-2),
    "float16": Tolerance(rtol=2e-3, atol=2e-3),
}


def has_cuda() -> bool:
    try:
        _core.Backend("cuda")
    except _core.EngineError:
        return False
    return True


DEVICES = ("cpu", *["cuda"] * has_cuda())
SMALL_CACHE = 64 << 20  # bytes: engines of tiny models leave room for other tests on their GPU


@pytest.fixture(scope="session", params=[*_core.cpu_isas(), *["cuda"] * has_cuda()])
def backend(request: pytest.FixtureRequest) -> _core.Backend:
    """A CPU backend for each instruction set of this machine, whose default width is 2 threads,
    and a GPU where there is one."""
    if request.param == "cuda":
        return _core.Backend("cuda")
    return _core.Backend("cpu", threads=2, isa=request.param)


@pytest.fixture(scope="session", params=_core.cpu_isas())
def cpu_backend(request: pytest.FixtureRequest) -> _core.Backend:
    """As `backend`, for what only the CPU promises: bits that no batch, cut or width changes."""
    return _core.Backend("cpu", threads=2, isa=request.param)


def is_gpu(backend: _core.Backend) -> bool:
    return backend.device.startswith("cuda")


def skip_what_no_gpu_does(backend: _core.Backend, dtype: str, *columns: int) -> None:
    """GPUs leave float32 to CPUs, and rows that are no multiples of 16 bytes."""
    if not is_gpu(backend):
        return
    if dtype == "float32":
        pytest.skip("a GPU computes in half precision")
    if any(count % 8 for count in columns):
        pytest.skip(f"rows of {columns} elements on a GPU")


def beside(view: NDArray[Any]) -> NDArray[Any]:
    """The wider rows that `with_gaps` took a view from, zero where it looks; empty for others."""
    wide = view.base
    if wide is None or wide.ndim != 2 or wide.shape[0] != view.shape[0]:
        return np.zeros(0)
    rest = wide.copy()
    begin = (view.ctypes.data - wide.ctypes.data) // view.itemsize
    rest[:, begin : begin + view.shape[1]] = 0
    return rest


def run_beside_cpu(backend: _core.Backend, op: str, limit: float, **operands: Any) -> None:
    """Runs an op in place; what a GPU writes must be what the CPU does from equal operands.

    `limit`: the share of a written array's values that may differ, for sums taken in another order
    round to other sides. How far they may be off is for the caller to check. Nothing may be written
    between rows.
    """
    arrays = {name: value for name, value in operands.items() if isinstance(value, np.ndarray)}
    copies = {name: array.copy() for name, array in arrays.items()}
    before = {name: beside(array) for name, array in arrays.items()}
    _core.run_op(op, backend, **operands)
    for name, array in arrays.items():
        np.testing.assert_array_equal(beside(array), before[name], f"{name}: beside its rows")
    if not is_gpu(backend):
        return
    _core.run_op(op, _core.Backend("cpu"), **{**operands, **copies})
    for name, array in arrays.items():
        ours, cpus = decode(array), decode(copies[name])
        differ = (ours != cpus) & ~(np.isnan(ours) & np.isnan(cpus))
        assert differ.mean() <= limit, f"{name}: {differ.mean():.2%} of the CPU's values differ"


@pytest.fixture(scope="session", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tolerance(dtype: str) -> Tolerance:
    return TOLERANCES[dtype]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Numbers of its own for every test and parameter, the same in every run."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama with a tokenizer; nobody changes it."""
    from tiny_models import write_tiny_llama  # with torch, which takes its time

    return write_tiny_llama(tmp_path_factory.mktemp("llama"), tokenizer=True)


@pytest.fixture(scope="session")
def h200() -> OpTable:
    """The op times of an H200 that the package has."""
    table = shipped_table("NVIDIA H200")
    assert table is not None
    return table


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admission foresees nothing, so that pages run out."""
    monkeypatch.setattr(Outlook, "peak", lambda self: 0)
