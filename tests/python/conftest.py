"""Fixtures of the kernel tests: backends by instruction set, dtypes and their tolerances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nanoflow import _core
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


@pytest.fixture(scope="session", params=_core.cpu_isas())
def backend(request: pytest.FixtureRequest) -> _core.Backend:
    """A CPU backend for each instruction set of this machine; the default width is 2 threads."""
    return _core.Backend("cpu", threads=2, isa=request.param)


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
