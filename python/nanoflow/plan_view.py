"""What a schedule does with a step: a measured step, and a picture of its lanes over one layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from nanoflow import _core
from nanoflow.scheduler.deal import Dealer

if TYPE_CHECKING:
    from matplotlib.patches import Patch

STAGE_COLORS = {
    "qkv": "#4e79a7",
    "attn": "#e15759",
    "o": "#76b7b2",
    "mlp": "#f1ce63",
    "head": "#9c755f",
}
_LABEL = re.compile(r"(?:layers\.(?P<layer>\d+)\.(?P<stage>\w+)\.(?P<part>\d+)|head) (?P<op>\w+)")


class Timing(Protocol):
    """When one op of a step ran; `_core.OpTiming`."""

    @property
    def name(self) -> str: ...
    @property
    def lane(self) -> str: ...
    @property
    def begin_us(self) -> float: ...
    @property
    def end_us(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Bar:
    """An op as it is drawn; `layer` is None for the head."""

    layer: int | None
    stage: str
    part: int
    op: str
    lane: str
    begin_us: float
    end_us: float


def to_bar(timing: Timing) -> Bar:
    """Reads a label such as "layers.3.mlp.1 gemm" or "head gemm"."""
    match = _LABEL.fullmatch(timing.name)
    if match is None:
        raise ValueError(f"{timing.name!r} is no label of an op")
    layer, stage, part = match["layer"], match["stage"], match["part"]
    return Bar(
        layer=None if layer is None else int(layer),
        stage=stage or "head",
        part=int(part or 0),
        op=match["op"],
        lane=timing.lane,
        begin_us=timing.begin_us,
        end_us=timing.end_us,
    )


def bars_of_layer(timings: Sequence[Timing], layer: int) -> list[Bar]:
    """All ops that ran between the first and the last of a layer, other layers' among them.

    Raises ValueError for a layer that did not run.
    """
    bars = [to_bar(timing) for timing in timings]
    own = [bar for bar in bars if bar.layer == layer]
    if not own:
        layers = 1 + max((bar.layer for bar in bars if bar.layer is not None), default=-1)
        raise ValueError(f"layer {layer} did not run: the step has layers 0 to {layers - 1}")
    begin, end = min(bar.begin_us for bar in own), max(bar.end_us for bar in own)
    return [bar for bar in bars if bar.end_us > begin and bar.begin_us < end]


def plan_of_layer(plan: _core.Plan, layer: int) -> str:
    """The plan's head lines and the lines of one layer's ops."""
    lines = repr(plan).splitlines()
    is_op = re.compile(r"\s*\d+\s")
    head = [line for line in lines if not is_op.match(line)]
    return "\n".join([*head, *(line for line in lines if f" layers.{layer}." in line)])


def segment_rows(schedule: _core.Schedule, rows: int) -> list[int]:
    """Rows of each segment when requests of one row each are dealt to them."""
    dealer = Dealer(schedule.cuts(), rows)
    dealt = dealer.deal_decodes(np.ones(rows, np.int64))
    return [int(np.count_nonzero(dealt == segment)) for segment in range(dealer.segments)]


def engine_config(rows: int, context: int, page_size: int = 64) -> _core.EngineConfig:
    """Capacities for steps of `rows` requests that read `context` keys each."""
    return _core.EngineConfig(
        max_num_batched_tokens=rows,
        max_num_seqs=rows,
        max_model_len=context,
        page_size=page_size,
        num_pages=rows * -(-context // page_size),
    )


def decode_batch(config: _core.EngineConfig, segments: Sequence[int], context: int) -> _core.Batch:
    """A step of one-row requests that read `context` keys each and want their timings.

    The keys are whatever the cache holds: for measuring, not for reading the tokens.
    """
    rows = sum(segments)
    pages = -(-context // config.page_size)

    def ints(values: NDArray[np.int64]) -> NDArray[np.int32]:
        return values.astype(np.int32)

    def filled(value: float) -> NDArray[np.float32]:
        return np.full(rows, value, np.float32)

    zeros = np.zeros(rows, np.int32)
    return _core.Batch(
        tokens=zeros,
        positions=zeros + np.int32(context - 1),
        request_indptr=ints(np.arange(rows + 1)),
        kv_len=zeros + np.int32(context),
        page_indptr=ints(np.arange(rows + 1) * pages),
        page_indices=ints(np.arange(rows * pages)),
        segment_requests=ints(np.concatenate([[0], np.cumsum(segments)])),
        sample_rows=ints(np.arange(rows)),
        slots=ints(np.arange(rows)),
        temperature=filled(0),
        top_p=filled(1),
        min_p=filled(0),
        top_k=zeros,
        seed=np.zeros(rows, np.uint64),
        counter=zeros,
        banned_indptr=np.zeros(rows + 1, np.int32),
        banned=np.zeros(0, np.int32),
        want_timings=True,
    )


def measure_step(
    engine: _core.Engine, segments: Sequence[int], context: int
) -> list[_core.OpTiming]:
    """When each op of a decode step ran; the second of two equal steps, so that memory is warm."""
    batch = decode_batch(engine.config, segments, context)
    engine.submit(batch).wait()
    return engine.submit(batch).wait().timings


def draw_lanes(
    timings: Sequence[Timing], lanes: Sequence[str], layer: int, title: str, path: Path
) -> None:
    """Writes a PNG: a row for each lane, the layer's ops in full colour, others' pale."""
    from matplotlib.figure import Figure  # slow to import, and needed here only

    bars = bars_of_layer(timings, layer)
    own = [bar for bar in bars if bar.layer == layer]
    begin, end = min(bar.begin_us for bar in own), max(bar.end_us for bar in own)
    figure = Figure(figsize=(14, 1.6 + 0.9 * len(lanes)), layout="constrained")
    axes = figure.subplots()
    for bar in bars:
        left, right = max(bar.begin_us, begin), min(bar.end_us, end)
        row = len(lanes) - 1 - lanes.index(bar.lane)
        color, is_own = STAGE_COLORS[bar.stage], bar.layer == layer
        axes.barh(
            row,
            right - left,
            left=left - begin,
            height=0.8,
            color=color,
            alpha=1.0 if is_own else 0.3,
            hatch="///" if bar.part % 2 else None,
            edgecolor="white",
            linewidth=0.5,
        )
        if is_own and right - left > (end - begin) / 45:
            text = f"{bar.stage}.{bar.part}\n{bar.op}"
            axes.text((left + right) / 2 - begin, row, text, ha="center", va="center", fontsize=7)
    busy = {
        lane: sum(min(b.end_us, end) - max(b.begin_us, begin) for b in bars if b.lane == lane)
        for lane in lanes
    }
    labels = [f"{lane}\nbusy {busy[lane] / (end - begin):.0%}" for lane in reversed(lanes)]
    axes.set_yticks(range(len(lanes)), labels)
    axes.set_xlim(0, end - begin)
    axes.set_xlabel(f"µs from the start of layer {layer}")
    axes.set_title(title, fontsize=10)
    figure.legend(handles=_legend(bars), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def _legend(bars: Sequence[Bar]) -> list[Patch]:
    """What the colours of stages mean, and how layers and nano-batches are told apart."""
    from matplotlib.patches import Patch

    stages = [stage for stage in STAGE_COLORS if any(bar.stage == stage for bar in bars)]
    handles = [Patch(color=STAGE_COLORS[stage], label=stage) for stage in stages]
    handles.append(Patch(facecolor="#888888", alpha=0.3, label="other layers"))
    if any(bar.part % 2 for bar in bars):
        handles.append(
            Patch(facecolor="#bbbbbb", edgecolor="white", hatch="///", label="odd nano-batches")
        )
    return handles
