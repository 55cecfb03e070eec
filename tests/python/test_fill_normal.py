"""Random values made on the device, bit for bit against NumPy on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import skip_what_no_gpu_does
from nanoflow import _core
from reference import decode, encode, poisoned

STD = np.float32(53509.92)  # of a sum of eight uniform 16-bit numbers: sqrt(8 * (2**32 - 1) / 12)


def philox(seed: int, count: int) -> NDArray[np.uint64]:
    """[count, 4] words of Philox4x32-10 for the counters 0, 1, 2, ..."""
    low = np.uint64(0xFFFFFFFF)
    index = np.arange(count, dtype=np.uint64)
    c = [index & low, index >> np.uint64(32), np.zeros_like(index), np.zeros_like(index)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            b >> np.uint64(32) ^ c[1] ^ np.uint64(key[0]),
            b & low,
            a >> np.uint64(32) ^ c[3] ^ np.uint64(key[1]),
            a & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, 1)


def expected(count: int, seed: int, mean: float, std: float) -> NDArray[np.float32]:
    words = philox(seed, count)
    sums = ((words & np.uint64(0xFFFF)) + (words >> np.uint64(16))).sum(1).astype(np.int64)
    centred = (sums - 8 * 0xFFFF // 2).astype(np.float32)
    return np.float32(mean) + np.float32(std) / STD * centred


def fill(backend: _core.Backend, dtype: str, *shape: int, **arguments: Any) -> NDArray[Any]:
    skip_what_no_gpu_does(backend, dtype)
    out = poisoned(shape, dtype)
    _core.run_op("fill_normal", backend, out=out, **arguments)
    return out


@pytest.mark.parametrize("count", [1, 7, 8, 4097, 100_003])
@pytest.mark.parametrize("seed, mean, std", [(0, 0.0, 0.02), (0xDEADBEEF12345678, 1.0, 0.1)])
def test_values_depend_on_seed_and_index_alone(
    backend: _core.Backend, dtype: str, count: int, seed: int, mean: float, std: float
) -> None:
    out = fill(backend, dtype, count, seed=seed, mean=mean, std=std)
    np.testing.assert_array_equal(out, encode(expected(count, seed, mean, std), dtype))


def test_a_matrix_is_filled_as_a_vector_is(backend: _core.Backend, dtype: str) -> None:
    matrix = fill(backend, dtype, 33, 24, seed=5, mean=0.0, std=1.0)
    np.testing.assert_array_equal(
        matrix.ravel(), fill(backend, dtype, 33 * 24, seed=5, mean=0.0, std=1.0)
    )


def test_values_are_normal(cpu_backend: _core.Backend) -> None:
    values = decode(fill(cpu_backend, "float32", 1_000_000, seed=1, mean=0.0, std=1.0))
    assert abs(values.mean()) < 4e-3
    assert abs(values.std() - 1) < 3e-3
    for sigmas, share in [(1, 0.6827), (2, 0.9545), (3, 0.9973)]:
        assert (np.abs(values) < sigmas).mean() == pytest.approx(share, abs=0.008)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4e-3


def test_what_cannot_be_filled_is_refused(cpu_backend: _core.Backend) -> None:
    out = np.zeros((4, 6), np.float32)
    with pytest.raises(_core.EngineError, match=r"fill_normal: out is .*, not contiguous"):
        _core.run_op("fill_normal", cpu_backend, out=out[:, :3], seed=0, mean=0.0, std=1.0)
    with pytest.raises(_core.EngineError, match="mean is 0 and std -1; both must be finite"):
        _core.run_op("fill_normal", cpu_backend, out=out, seed=0, mean=0.0, std=-1.0)
