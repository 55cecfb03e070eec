"""The matrix products of Llama-3.1-8B's layers, run to be timed under sustained load."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch
from timing import burst_us, sustained

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
COPIES = 3  # of the weights, taken in turn, so that none stays in the cache
GRAPH_US = 6000  # what a graph of launches is to take

Run = Callable[[int], object]  # takes how many ran before
Name = TypeVar("Name", bound=Hashable)


class Operands(NamedTuple):
    """Of a product: random numbers, and zeros for what comes out."""

    x: torch.Tensor  # [rows, depth]
    weights: list[torch.Tensor]  # `COPIES` of [features, depth]
    out: torch.Tensor  # [rows, features], of gate_up's gated half as many

    def weight(self, i: int) -> torch.Tensor:
        return self.weights[i % COPIES]


def operands(shape: str, rows: int, is_gated: bool = False) -> Operands:
    features, depth = SHAPES[shape]
    return Operands(
        torch.randn(rows, depth, device="cuda").bfloat16(),
        [(torch.randn(features, depth, device="cuda") * 0.02).bfloat16() for _ in range(COPIES)],
        torch.zeros(
            rows, features // 2 if is_gated else features, device="cuda", dtype=torch.bfloat16
        ),
    )


def timer(run: Run) -> Callable[[float], dict[str, float]]:
    """Takes seconds: `sustained` for so long, its µs those of one run. A graph of many is replayed,
    so that launching never limits."""
    count = max(COPIES, int(GRAPH_US / burst_us(run, 3)) // COPIES * COPIES)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            run(i)

    def time(seconds: float) -> dict[str, float]:
        result = sustained(lambda _: graph.replay(), seconds)
        return result | {"us": result["us"] / count}

    return time


def timed_in_turns(runs: Mapping[Name, Run], seconds: float) -> dict[Name, dict[str, float]]:
    """The mean of two sustained runs of `seconds` of each, the second ones in reverse."""
    timers = {name: timer(run) for name, run in runs.items()}
    samples: dict[Name, list[dict[str, float]]] = {name: [] for name in runs}
    for name in (*runs, *reversed(list(runs))):
        samples[name].append(timers[name](seconds))
    return {
        name: {key: sum(sample[key] for sample in pair) / len(pair) for key in pair[0]}
        for name, pair in samples.items()
    }
