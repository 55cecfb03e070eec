"""LLaMA-2-70B on eight A100s, as NanoFlow's paper and code tell it (OSDI'25, arXiv 2408.12757).

One layer of an iteration with 2048 rows: the times that ops take alone (Table 2), how a partner
does beside a product of matrices (the table of the authors' search), the pipeline of Figure 6 as
their code issues it, and the three bars of the ablation (Figure 9).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nanoflow.tune.program import Program, Task
from nanoflow.tune.simulate import Cost, SharedDevice

LAYERS = 80
ROWS = 2048
# Milliseconds of an iteration, each op alone.
ALONE_MS = {
    "kqv": 16.08,
    "o": 16.01,
    "ug": 69.92,
    "d": 34.96,
    "gemv": 35.60,
    "pf": 4.56,
    "net": 47.92,
}
SPLIT_COST = 1.13  # of a nano-batched iteration without overlap, over one without nano-batches
ABLATION_MS = {"sequential": 225.0, "nano": 225.0 * SPLIT_COST, "overlap": 199.0}

# R of the partner to its P.
PERFORMANCE = {
    "memory": [
        (0.1, 0.25),
        (0.2, 0.4),
        (0.3, 0.5),
        (0.4, 0.6),
        (0.5, 0.7),
        (0.6, 0.8),
        (0.7, 0.85),
        (0.8, 0.9),
        (0.9, 0.95),
    ],
    "network": [(0.1, 0.4), (0.2, 0.6), (0.3, 0.7), (0.4, 0.8), (0.5, 0.9)],
}
INTERFERENCE = SharedDevice(PERFORMANCE)

COMPUTE, MEMORY, NETWORK = 0, 1, 2
_NANO = {1: 640, 2: 1408}  # rows of the two nano-batches
_QUARTERS = {1: 256, 2: 384, 3: 768, 4: 640}  # rows of kqv; those of the first three decode
_DECODES = 256 + 384 + 768

_GATHER, _REDUCE = 1, 2  # bytes of the two collectives, relative
_TRAFFIC = ROWS * 4  # of a layer: two gathers and a reduction, or two reductions


def tasks(lane_of: Callable[[str], int]) -> tuple[Task, ...]:
    """Every op and what it waits for; a kqv waits for the last reduction of the layer before."""

    def task(name: str, *after: str, before: str | None = None) -> Task:
        earlier = ((before, 1),) if before else ()
        return Task(name, lane_of(name), (*earlier, *((other, 0) for other in after)))

    return (
        task("kqv1", before="ar_d1"),
        task("kqv2", before="ar_d1"),
        task("gemv1", "kqv1"),
        task("gemv2", "kqv2"),
        task("kqv3", before="ar1_d2"),
        task("kqv4", before="ar2_d2"),
        task("gemv3", "kqv3"),
        task("pf", "kqv4"),
        task("ag_attn", "gemv1", "gemv2"),
        task("o1", "ag_attn"),
        task("ag_o1", "o1"),
        task("o2", "gemv3", "pf"),
        task("ar_o2", "o2"),
        task("ug1", "ag_o1"),
        task("d1", "ug1"),
        task("ar_d1", "d1"),
        task("ug2", "ar_o2"),
        task("d2", "ug2"),
        task("ar1_d2", "d2"),
        task("ar2_d2", "d2"),
    )


def lane(name: str) -> int:
    if name.startswith(("ag", "ar")):
        return NETWORK
    return MEMORY if name.startswith(("gemv", "pf")) else COMPUTE


# R of what runs beside products, as Figure 6 gives them.
SHARES = {
    **dict.fromkeys(("gemv1", "gemv2", "gemv3", "pf"), 0.4),
    **dict.fromkeys(("ag_attn", "ag_o1"), 0.2),
    "ar_o2": 0.2,
    "ar_d1": 0.1,
    "ar1_d2": 0.2,
    "ar2_d2": 0.2,
}


def cost(name: str, shares: Mapping[str, float]) -> Cost:
    """Of one layer, with the cost of splitting charged to every op alike."""
    kind = ("compute", "memory", "network")[lane(name)]
    return Cost(_us(name) * SPLIT_COST, kind=kind, share=shares.get(name, 0.0))


def _us(name: str) -> float:
    per_layer = {op: ms * 1e3 / LAYERS for op, ms in ALONE_MS.items()}
    if name == "pf":
        return per_layer["pf"]
    if lane(name) == NETWORK:
        kind = _REDUCE if name.startswith("ar") else _GATHER
        rows = {"ar1_d2": _QUARTERS[3], "ar2_d2": _QUARTERS[4]}.get(name)
        rows = rows or _NANO[2 if name.endswith("2") else 1]
        return per_layer["net"] * kind * rows / _TRAFFIC
    op, number = name[:-1], int(name[-1])
    rows = _QUARTERS[number] if op in ("kqv", "gemv") else _NANO[number]
    return per_layer[op] * rows / (_DECODES if op == "gemv" else ROWS)


def program(lane_of: Callable[[str], int] = lane) -> Program:
    """In the order of the authors' code."""
    made = tasks(lane_of)
    return Program(made, tuple((i, 0) for i in range(len(made))))
