"""`nanoflow tune`: the profile of a device that is known, and the command on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import DEVICES
from made_up_table import made_up_table
from nanoflow import _core
from nanoflow.cli import main
from nanoflow.config import EngineArgs
from nanoflow.mixed_step import StepMix, capacities, deal_step, filling
from nanoflow.schedule import built_in_schedule, load_schedule
from nanoflow.tune.auto import choose_schedules
from nanoflow.tune.command import MOST_CUTS
from nanoflow.tune.costs import CostModel, Load
from nanoflow.tune.measure import Run, mean_op_us
from nanoflow.tune.profile import Device, Grid, load_of, profile
from nanoflow.tune.program import program_of
from nanoflow.tune.search import parted, ping_pong
from nanoflow.tune.simulate import simulate
from nanoflow.tune.table import OpTable, load_table
from test_tune_search import llama_8b
from tiny_models import write_tiny_llama

GRID = Grid(rows=(128, 256, 512), decodes=(128, 256), context=512, widths=(1, 2))
OPS = {
    "qkv": ("rms_norm", "gemm", "rope_append"),
    "attn": ("attention",),
    "o": ("gemm",),
    "mlp": ("rms_norm", "gemm_silu_mul", "gemm"),
}


class Oracle:
    """Runs steps as a table says they go."""

    def __init__(self, table: OpTable) -> None:
        self.table, self.model = table, CostModel(table, llama_8b())
        self.runs = 0

    def measure(self, schedule: _core.Schedule, mix: StepMix) -> Run:
        self.runs += 1
        load = load_of(mix)
        prediction = self.model.predict(schedule, load)
        clock = prediction.clock
        program, costs = program_of(schedule), self.model.costs(schedule, load, clock)
        op_us = {}
        for span in simulate(program, costs, self.table.interference()):
            if span.layer == 4:
                name = program.tasks[span.task].name
                alone = costs[span.task].us
                for op, us in self.ops(name, alone, schedule, load, clock).items():
                    stage, part = name.split(".")
                    op_us[stage, int(part), op] = us * (span.end_us - span.begin_us) / alone
        op_us["head", 0, "gemm"] = self.model.head(schedule, load, clock).us
        watts = prediction.joules / prediction.step_us * 1e6 + self.table.idle_watts
        return Run(prediction.step_us, watts, 1000.0 * clock, op_us)

    def ops(
        self, name: str, alone: float, schedule: _core.Schedule, load: Load, clock: float
    ) -> dict[str, float]:
        """How a part's time is shared out among its ops."""
        stage = name.split(".")[0]
        if len(OPS[stage]) == 1:
            return {OPS[stage][0]: alone}
        width = schedule.lanes[schedule.lane_of(stage, 0)].width
        rows = load.rows // (len(schedule.cuts()) + 1)
        shapes = {"qkv": [(6144, 4096)], "mlp": [(28672, 4096), (4096, 14336)]}[stage]
        gemms = [op for op in OPS[stage] if op.startswith("gemm")]
        times = {
            op: self.table.product(rows, *shape, width, clock).us
            for op, shape in zip(gemms, shapes, strict=True)
        }
        others = [op for op in OPS[stage] if op not in gemms]
        rest = (alone - sum(times.values())) / len(others)
        return times | dict.fromkeys(others, rest)


def profiled(oracle: Oracle) -> OpTable:
    device = Device("made up", 4, 1, oracle.table.idle_watts, oracle.table.cap_watts)
    return profile(oracle.measure, llama_8b(), device, GRID, {})


@pytest.mark.parametrize("cap_watts", [0.0, 200.0])
def test_a_profile_finds_the_times_that_runs_were_made_with(cap_watts: float) -> None:
    table = made_up_table(pj_per_flop=0.8, cap_watts=cap_watts)
    oracle = Oracle(dataclasses.replace(table, energy_exponent=0.8))
    found = profiled(oracle)
    assert found.cap_watts == pytest.approx(cap_watts, rel=0.01)
    if cap_watts > 0:
        assert found.energy_exponent == pytest.approx(0.8, abs=0.05)
    assert oracle.runs == GRID.runs
    # Runs do not tell what memory lets through.
    shared = dataclasses.replace(found, shared_memory_rate=oracle.table.shared_memory_rate)
    model = CostModel(shared, llama_8b())
    for load in (Load(256, 512), Load(128, 512), Load(128, 512, 128, 64)):
        for schedule in (
            built_in_schedule("sequential", 4),
            parted((1, 1, 1, 1), 0.5, 1, 4),
            ping_pong(2, 4),
        ):
            expected = oracle.model.predict(schedule, load)
            predicted = model.predict(schedule, load)
            assert predicted.clock_us == pytest.approx(expected.clock_us, rel=0.05)
            assert predicted.joules == pytest.approx(expected.joules, rel=0.1)
            assert predicted.step_us == pytest.approx(expected.step_us, rel=0.05)
    assert list(found.slowdown.values()) == pytest.approx([1, 1], abs=0.02)


def test_a_profile_finds_what_ops_do_to_each_other() -> None:
    slowdown = {("compute", "memory"): 1.2, ("memory", "compute"): 1.5}
    oracle = Oracle(dataclasses.replace(made_up_table(), slowdown=slowdown))
    found = profiled(oracle).slowdown
    assert found["compute", "memory"] == pytest.approx(1.2, abs=0.06)
    assert found["memory", "compute"] == pytest.approx(1.5, abs=0.06)


@pytest.mark.parametrize(("rows", "requests", "context"), [(96, 3, 130), (40, 8, 40), (64, 1, 64)])
def test_a_cache_is_filled_to_its_last_page(rows: int, requests: int, context: int) -> None:
    config = _core.EngineConfig(
        max_num_batched_tokens=rows,
        max_num_seqs=requests,
        max_model_len=context,
        page_size=64,
        num_pages=11,
    )
    written = set()
    for step, first in filling(config):
        assert step.rows.sum() <= rows and len(step.rows) <= requests
        assert set(step.kv_len) == {min(context, 64)}
        written |= set(range(first, first + step.pages().sum()))
    assert written == set(range(11))


@given(st.lists(st.integers(1, 99), max_size=15, unique=True))
def test_a_step_fits_the_engine_wherever_it_is_cut(percents: list[int]) -> None:
    mix = StepMix(decodes=50, context=100, prefill_rows=330)
    config = capacities([deal_step(mix, [])], MOST_CUTS)
    step = deal_step(mix, [percent / 100 for percent in sorted(percents)])
    assert int(step.pages().sum()) <= config.num_pages
    assert len(step.rows) <= config.max_num_seqs
    assert int(step.rows.sum()) <= config.max_num_batched_tokens


def test_a_model_that_is_not_dense_is_refused() -> None:
    oracle = Oracle(made_up_table())

    def measure(schedule: _core.Schedule, mix: StepMix) -> Run:
        run = oracle.measure(schedule, mix)
        routed = {("mlp", 0, "gemm_silu_mul"): "experts"}
        op_us = {(*name[:2], routed.get(name, name[2])): us for name, us in run.op_us.items()}
        return dataclasses.replace(run, op_us=op_us)

    device = Device("made up", 4, 1, 0.0, 0.0)
    with pytest.raises(ValueError, match="mlp of this model has no gemm_silu_mul but experts"):
        profile(measure, llama_8b(), device, GRID, {})


def test_the_first_layer_is_left_out_of_the_means() -> None:
    times = {"layers.0.mlp.0 gemm": 90.0, "layers.1.mlp.0 gemm": 10.0, "layers.2.mlp.0 gemm": 30.0}
    times |= {"head gemm": 7.0}
    timings = [FakeTiming(name, us) for name, us in times.items()]
    assert mean_op_us(timings) == {  # type: ignore[arg-type]
        ("mlp", 0, "gemm"): 20.0,
        ("head", 0, "gemm"): 7.0,
    }


@dataclasses.dataclass(frozen=True)
class FakeTiming:
    name: str
    end_us: float
    begin_us: float = 0.0
    lane: str = "all"


@pytest.mark.parametrize("device", DEVICES)
def test_the_command_measures_searches_and_keeps_the_winner(
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    model = write_tiny_llama(
        tmp_path / "model", num_layers=3, hidden_size=256, intermediate_size=384
    )
    width = {"cpu": 1, "cuda": 24}[device]  # of the lane of attention
    flags = ["--model", str(model), "--device", device, "--dtype", "bfloat16"]
    flags += ["--cpu-threads", "3"] if device == "cpu" else []
    sizes = ["--rows", "4", "16", "--decodes", "4", "8", "--context", "32", "--candidates", "3"]
    sizes += ["--seconds", {"cpu": "0.02", "cuda": "0.6"}[device], "--widths", str(width)]
    outputs = ["--table", str(tmp_path / "table.json"), "--output", str(tmp_path / "best.json")]
    assert main(["tune", *flags, *sizes, *outputs]) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "cache" / "nanoflow" / "schedules").glob("tuned-*.json")
    assert f"{path}: schedule='auto' uses it from now on" in printed
    result = json.loads(path.read_text())
    names = [one["schedule"]["id"] for one in result["measured"]]
    assert len(names) == 3 and "sequential" in names
    assert load_schedule(tmp_path / "best.json").id == names[0]
    rates = [one["tokens_per_second"] for one in result["measured"]]
    assert rates == sorted(rates, reverse=True)
    assert all(name in printed for name in names)
    backend = _core.Backend(device, threads=3 if device == "cpu" else 0)
    table = load_table(tmp_path / "table.json")
    found: dict[int, set[float]] = defaultdict(set)
    for product in table.products:
        for entry in product.entries:
            assert entry.us > 0
            found[entry.width].add(entry.size)
    assert found == {backend.width: {4, 8, 16}, backend.width - width: {4, 8, 16}}
    assert {entry.width for entry in table.decode} == {width, backend.width}
    halves = ping_pong(width, backend.width).id
    assert [step.schedule["id"] for step in table.steps] == [halves, *names]
    chosen = choose_schedules(EngineArgs(model=model), backend, spec_of(model))
    ids = [schedule.id for schedule in chosen.schedules]
    assert ids == names[:1] if device == "cpu" else set(ids) >= set(names)


def spec_of(model: Path) -> _core.ModelSpec:
    from nanoflow.loading import open_checkpoint

    checkpoint = open_checkpoint(model)
    return _core.ModelSpec(**checkpoint.model.spec_arguments("bfloat16"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--widths", "3"], "--widths 3 must be below the device's 3"),
        (["--rows", "0"], "must be at least 1"),
        (["--context", "32", "--decodes", "0", "4"], "must be at least 1"),
    ],
)
def test_sizes_that_cannot_be(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_llama(tmp_path, num_layers=1)
    common = ["--model", str(model), "--device", "cpu", "--cpu-threads", "3"]
    assert main(["tune", *common, *flags]) == 1
    assert message in capsys.readouterr().err
