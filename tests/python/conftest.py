"""Fixtures of the kernel tests: backends by instruction set, dtypes and their tolerances."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nanoflow import _core
from nanoflow.scheduler.forecast import Outlook
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


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Skips what the GPU says it does not do: odd sizes and float32, which the CPU does.

    The sizes of real models are tested in test_cuda_ops.py, where nothing is skipped."""
    try:
        return (yield)
    except _core.EngineError as error:
        if "GPU" in str(error) and pyfuncitem.fspath.basename != "test_cuda_ops.py":
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tolerance(dtype: str) -> Tolerance:
    return TOLERANCES[dtype]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admission foresees nothing, so that pages run out."""
    monkeypatch.setattr(Outlook, "peak", lambda self: 0)
