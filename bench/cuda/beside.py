"""Times a layer's products and decode attention in turn, and beside each other on the same SMs.

Usage: python bench/cuda/beside.py LIBRARY OUT.json COMMIT
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from native import Kernels, attention_batch
from timing import environment, sustained

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 64
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LAYERS = 4  # that a graph runs, with weights of their own
SECONDS = 1.6
# rows of a nano-batch's products, lengths of the other's decodes
CASES = ((512, [768] * 256), (1024, [768] * 512), (512, [1024] * 340), (768, [1024] * 340))

Run = Callable[[], None]


class Layer:
    """The products of one nano-batch."""

    def __init__(self, kernels: Kernels, rows: int) -> None:
        def random(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, device="cuda") * 0.02).bfloat16()

        self.kernels = kernels
        self.weights = [
            {name: random(*shape) for name, shape in SHAPES.items()} for _ in range(LAYERS)
        ]
        self.x = torch.randn(rows, 4096, device="cuda").bfloat16()
        self.qkv, self.mlp, self.out = random(rows, 6144), random(rows, 14336), random(rows, 4096)

    def run(self, beside: bool) -> None:
        for w in self.weights:
            for name in SHAPES:
                if name == "qkv":
                    self.kernels.gemm(self.x, w[name], self.qkv, beside=beside)
                elif name == "gate_up":
                    self.kernels.gemm(self.x, w[name], self.mlp, silu_mul=True, beside=beside)
                else:
                    x = self.x if name == "o" else self.mlp
                    self.kernels.gemm(x, w[name], self.out, accumulate=True, beside=beside)


class Decodes:
    """The attention of one nano-batch, as often as there are layers."""

    def __init__(self, kernels: Kernels, lengths: Sequence[int]) -> None:
        self.kernels = kernels
        self.batch = attention_batch([[(1, length) for length in lengths]], PAGE, 16, seed=0)
        pages = self.batch.tables["page_indices"].numel()
        self.cache = torch.randn(
            pages, 2, KV_HEADS, PAGE, HEAD_DIM, device="cuda", dtype=torch.bfloat16
        )
        rows = self.batch.padded_rows
        self.q = torch.randn(rows, HEADS * HEAD_DIM, device="cuda").bfloat16()
        self.out = torch.empty_like(self.q)
        self.work = {b: kernels.attention_work(self.batch, HEADS, KV_HEADS) for b in (False, True)}
        for beside, work in self.work.items():
            kernels.plan_attention(
                self.batch, work, HEADS, KV_HEADS, (0, 1), beside=beside, tile_sms=kernels.sms
            )
        self.bytes = LAYERS * 4 * KV_HEADS * HEAD_DIM * sum(lengths)

    def run(self, beside: bool) -> None:
        k, v = self.cache[:, 0], self.cache[:, 1]
        work = self.work[beside]
        part = "decode" if beside else "all"
        for _ in range(LAYERS):
            self.kernels.attention(
                self.q, self.out, k, v, self.batch, work, part=part, beside=beside
            )


def captured(*runs: Run) -> Run:
    """A graph of these, each on a stream of its own."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        main = torch.cuda.current_stream()
        for run in runs[1:]:
            side = torch.cuda.Stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                run()
            streams.append(side)
        runs[0]()
        for side in streams[-len(runs[1:]) :] if runs[1:] else ():
            main.wait_stream(side)
    graphs.append(graph)
    return graph.replay


streams: list[torch.cuda.Stream] = []  # as long as their graphs
graphs: list[torch.cuda.CUDAGraph] = []


def contended(run: Run, other: Run, seconds: float) -> dict[str, float]:
    """µs of each while both are replayed without a pause."""
    counts = [0, 0]
    stop = threading.Event()
    marks: list[list[torch.cuda.Event]] = [[], []]

    def loop(index: int, replay: Run) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                replay()
                mark = torch.cuda.Event(enable_timing=True)
                mark.record()
                marks[index].append(mark)
                counts[index] += 1
                if len(marks[index]) > 4:
                    marks[index][-4].synchronize()

    threads = [threading.Thread(target=loop, args=item) for item in enumerate((run, other))]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    times = []
    for own in marks:
        middle = len(own) // 2
        last = len(own) - 8
        times.append(own[middle].elapsed_time(own[last]) * 1e3 / (last - middle))
    return {"products_us": times[0] / LAYERS, "attention_us": times[1] / LAYERS}


def measure(kernels: Kernels, rows: int, lengths: list[int]) -> dict[str, Any]:
    layer, decodes = Layer(kernels, rows), Decodes(kernels, lengths)
    entry: dict[str, Any] = {"rows": rows, "decodes": len(lengths), "keys": lengths[0]}

    def timed(name: str, *runs: Run) -> None:
        replay = captured(*runs)
        result = sustained(lambda _: replay(), SECONDS)
        entry[name] = result | {"us": result["us"] / LAYERS}
        print(f"{rows:5} {len(lengths):4} x {lengths[0]:5} {name:22}", end="")
        print(f" {entry[name]['us']:8.1f} us {result['watts']:4.0f} W {result['sm_mhz']:5.0f} MHz")

    def in_turn() -> None:
        layer.run(False)
        decodes.run(False)

    timed("in turn", in_turn)
    timed("beside", lambda: layer.run(True), lambda: decodes.run(True))
    timed("products", lambda: layer.run(False))
    timed("attention", lambda: decodes.run(False))
    timed("products beside none", lambda: layer.run(True))
    timed("attention beside none", lambda: decodes.run(True))
    contention = contended(
        captured(lambda: layer.run(True)), captured(lambda: decodes.run(True)), SECONDS
    )
    entry["contended"] = contention
    print("contended", contention)
    return entry


def main() -> None:
    kernels = Kernels(Path(sys.argv[1]))
    torch.manual_seed(0)
    results = [measure(kernels, *case) for case in CASES]
    Path(sys.argv[2]).write_text(
        json.dumps({**environment(sys.argv[3]), "results": results}, indent=1)
    )


if __name__ == "__main__":
    main()
