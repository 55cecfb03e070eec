"""A plan as a page: lanes and their shares, nano-batches, predicted times beside measured ones."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from nanoflow._core import Schedule
from nanoflow.mixed_step import StepMix
from nanoflow.plan_view import Panel, draw_lanes
from nanoflow.tune.costs import CostModel, Prediction
from nanoflow.tune.measure import Run
from nanoflow.tune.profile import load_of
from nanoflow.tune.program import STAGES, parts_of, program_of
from nanoflow.tune.simulate import LAYERS, simulate

_STYLE = (
    "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ccc}svg{max-width:100%;"
    "height:auto}"
)


@dataclass(frozen=True, slots=True)
class PredictedTiming:
    """A part of a layer as the simulator sees it; a Timing of plan_view."""

    name: str
    lane: str
    begin_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class PlanPage:
    """What there is to show of a step."""

    title: str
    schedule: Schedule
    width: int  # of the device
    unit: str  # SMs or threads
    segment_rows: Sequence[int]
    mix: StepMix
    layer: int
    panels: Sequence[Panel]
    run: Run
    prediction: Prediction | None  # where the device's op times are known

    def lanes(self) -> dict[str, str]:
        """What to say of each lane beside its name."""
        return {
            lane.name: f", {lane.width} {self.unit} ({lane.width / self.width:.0%})"
            for lane in self.schedule.lanes
        }

    def write_png(self, path: Path) -> None:
        draw_lanes(self.panels, self.lanes(), self.layer, self.title, path)

    def write_html(self, path: Path) -> None:
        """One file, with the picture as SVG in it."""
        picture = io.BytesIO()
        draw_lanes(self.panels, self.lanes(), self.layer, self.title, picture, form="svg")
        svg = picture.getvalue().decode()
        order = " ".join(self.schedule.order) or "each stage in turn"
        body = [
            f"<h1>{escape(self.title)}</h1>",
            _table(("lane", self.unit, "share"), self._lane_rows()),
            _table(("stage", "lane", "rows of its nano-batches"), self._stage_rows()),
            f"<p>Order of a period: {escape(order)}</p>",
            _table(("step", "predicted", "measured"), self._step_rows()),
            svg[svg.index("<svg") :],
        ]
        head = f"<meta charset='utf-8'><title>{escape(self.title)}</title><style>{_STYLE}</style>"
        page = [f"<!doctype html><html><head>{head}</head><body>", *body, "</body></html>", ""]
        path.write_text("\n".join(page), encoding="utf-8")

    def _lane_rows(self) -> list[tuple[str, ...]]:
        return [
            (lane.name, str(lane.width), f"{lane.width / self.width:.0%}")
            for lane in self.schedule.lanes
        ]

    def _stage_rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for stage in STAGES:
            parts = [part for part in parts_of(self.schedule) if part.stage == stage]
            sizes = [str(sum(self.segment_rows[part.begin : part.end])) for part in parts]
            lanes = {self.schedule.lane_of(stage, part.number): None for part in parts}
            names = ", ".join(self.schedule.lanes[lane].name for lane in lanes)
            rows.append((stage, names, " + ".join(sizes)))
        return rows

    def _step_rows(self) -> list[tuple[str, ...]]:
        tokens = load_of(self.mix).rows
        predicted = None if self.prediction is None else self.prediction.step_us
        both = (predicted, self.run.us)
        rows: list[tuple[str, ...]] = [
            ("ms", *("" if us is None else f"{us / 1e3:.4g}" for us in both)),
            ("tokens/s", *("" if us is None else f"{tokens / us * 1e6:.0f}" for us in both)),
        ]
        if self.run.watts:
            rows.append(("W", "", f"{self.run.watts:.0f}"))
            rows.append(("MHz", "", f"{self.run.mhz:.0f}"))
        return rows


def predicted_panel(
    model: CostModel, schedule: Schedule, mix: StepMix, layer: int
) -> tuple[Panel, Prediction]:
    """The simulator's layers around one in the middle, which stands for `layer`."""
    load = load_of(mix)
    prediction = model.predict(schedule, load)
    program, costs = program_of(schedule), model.costs(schedule, load, prediction.clock)
    middle = LAYERS // 2
    timings = [
        PredictedTiming(
            f"layers.{layer + span.layer - middle}.{program.tasks[span.task].name} predicted",
            schedule.lanes[program.tasks[span.task].lane].name,
            span.begin_us,
            span.end_us,
        )
        for span in simulate(program, costs, model.table.interference())
        if layer + span.layer >= middle
    ]
    return Panel(f"predicted: {prediction.layer_us:.0f} µs a layer", timings), prediction


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"
