"""What a schedule does with a step: a layer's part of its plan, and a picture of its lanes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from nanoflow import _core

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


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of a layer: as measured, say, or as predicted."""

    title: str
    timings: Sequence[Timing]


def draw_lanes(
    panels: Sequence[Panel],
    lanes: Mapping[str, str],
    layer: int,
    title: str,
    to: Path | BinaryIO,
    *,
    form: str = "png",
) -> None:
    """Writes a PNG or SVG: panels on one scale of time; in each a row for each lane that runs
    something, the layer's ops in full colour, others' pale.

    `lanes`: the names of lanes in order, and what else to say of each.
    """
    from matplotlib.figure import Figure  # slow to import, and needed here only

    drawn = [bars_of_layer(panel.timings, layer) for panel in panels]
    rows = [[lane for lane in lanes if any(bar.lane == lane for bar in bars)] for bars in drawn]
    height = 0.6 + sum(1.0 + 0.9 * len(names) for names in rows)
    figure = Figure(figsize=(14, height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    ratios = [1 + len(names) for names in rows]
    plots = figure.subplots(len(panels), squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
    for axes, panel, bars, names in zip(plots, panels, drawn, rows, strict=True):
        _draw_bars(axes, bars, layer, {lane: lanes[lane] for lane in names})
        axes.set_title(panel.title, fontsize=9, loc="left")
    plots[-1].set_xlabel(f"µs from the start of layer {layer}")
    figure.legend(
        handles=_legend([bar for bars in drawn for bar in bars]),
        loc="outside right upper",
        fontsize=8,
    )
    figure.savefig(to, dpi=150, format=form)


def _draw_bars(axes: Any, bars: Sequence[Bar], layer: int, lanes: Mapping[str, str]) -> None:
    own = [bar for bar in bars if bar.layer == layer]
    begin, end = min(bar.begin_us for bar in own), max(bar.end_us for bar in own)
    names = list(lanes)
    busy = dict.fromkeys(names, 0.0)
    for bar in bars:
        left, right = max(bar.begin_us, begin), min(bar.end_us, end)
        busy[bar.lane] += right - left
        row = len(names) - 1 - names.index(bar.lane)
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
    labels = [
        f"{lane}{lanes[lane]}\nbusy {busy[lane] / (end - begin):.0%}" for lane in reversed(names)
    ]
    axes.set_yticks(range(len(names)), labels)


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
