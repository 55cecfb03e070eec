"""A table of op times of a device that there is not, for tests of the search."""

from __future__ import annotations

from nanoflow.tune.table import Entry, OpTable, Product


def made_up_table(
    width: int = 4,
    width_step: int = 1,
    *,
    decode_saturates_at: float = 0.25,
    pj_per_flop: float = 0.0,
    cap_watts: float = 0.0,
) -> OpTable:
    """Products take what their FLOPs take on their share of the device; decode attention reaches
    all of its bandwidth on a part of it, whatever is beside it. Power and clock are as at full
    clock, below the cap."""
    widths = range(width_step, width + 1, width_step)

    def entry(size: float, at: int, us: float, joules: float = 0.0) -> Entry:
        return Entry(size, at, us, watts=joules / us * 1e6, mhz=1000)

    def flops(rows: int) -> float:
        return 2.0 * rows * 4096 * 4096

    products = tuple(
        entry(rows, at, flops(rows) / 600e6 * width / at, flops(rows) * pj_per_flop * 1e-12)
        for rows in (128, 256, 512, 1024)
        for at in widths
    )
    read = 1e9
    return OpTable(
        device="made up",
        width=width,
        width_step=width_step,
        idle_watts=0.0,
        cap_watts=cap_watts,
        max_mhz=1000,
        products=(Product(4096, 4096, products),),
        decode=tuple(
            entry(read, at, read / 3e6 * max(1.0, decode_saturates_at * width / at))
            for at in widths
        ),
        prefill=tuple(entry(1e10, at, 1e10 / 300e6 * width / at) for at in widths),
        rows=tuple(entry(1e8, at, 40.0 * width / at) for at in widths),
        shared_memory_rate=1e3,  # more than all ops together read
    )
