"""Random weights made from a config alone, for runs that measure and do not need sense."""

from __future__ import annotations

import zlib

from nanoflow.loading.loader import WeightStore

_MATRIX_STD = 0.02  # what such models are initialised with
_NORM_STD = 0.1  # norm weights lie around 1


def fill_dummy_weights(store: WeightStore, seed: int) -> None:
    """Draws all of `store` where it lies: norms as 1 + 0.1 N(0, 1), the rest as 0.02 N(0, 1).

    The values depend on the tensor's name and the seed alone, and are the same on every device.
    """
    for name in store.shapes():
        is_norm = name.endswith("norm")
        store.fill_normal(
            name,
            seed=zlib.crc32(name.encode()) << 32 | seed % (1 << 32),
            mean=1.0 if is_norm else 0.0,
            std=_NORM_STD if is_norm else _MATRIX_STD,
        )
    store.finish()
