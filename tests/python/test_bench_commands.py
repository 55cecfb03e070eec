"""`bench latency`, `bench startup` and `bench throughput --ablate` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import plot_ablation
from nanoflow.arguments import ArgumentParser
from nanoflow.bench import steady_run
from nanoflow.bench.ablation import ablation_schedules, compare, table
from nanoflow.bench.command import add_bench_arguments
from nanoflow.bench.latency import summary
from nanoflow.bench.startup import start_once
from nanoflow.cli import run_command
from nanoflow.errors import EngineError
from nanoflow.schedule import built_in_schedule, schedule_to_json

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def bench(*arguments: str | Path) -> int:
    parser = ArgumentParser(prog="bench")
    add_bench_arguments(parser)
    return run_command(parser, [str(argument) for argument in arguments])


def test_latency_writes_vllms_fields(model, tmp_path, capsys):
    path = tmp_path / "latency.json"
    sizes = ("--input-len", "6", "--output-len", "4", "--batch-size", "3")
    iterations = ("--num-iters-warmup", "1", "--num-iters", "4")
    assert bench("latency", "--model", model, *sizes, *iterations, "--output-json", path) == 0
    found = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert printed.startswith(f"Avg latency: {found['avg_latency']} seconds\n10% percentile")
    assert len(found["latencies"]) == 4
    assert found["avg_latency"] == pytest.approx(np.mean(found["latencies"]))
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert found["percentiles"]["50"] == pytest.approx(np.median(found["latencies"]))
    assert (found["batch_size"], found["input_len"], found["output_len"]) == (3, 6, 4)
    assert found["device"] and found["command"]


def test_latency_is_summed_up_in_seconds():
    found = summary([1.0, 2.0, 3.0])
    assert found["avg_latency"] == 2.0
    assert found["percentiles"]["25"] == 1.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-size", "0"), "--batch-size 0 must be at least 1"),
        (("--n", "0"), "--n 0 must be at least 1"),
        (("--num-iters", "0"), "--num-iters 0 must be at least 1"),
        (("--num-iters-warmup", "-1"), "--num-iters-warmup -1 must be at least 0"),
        (("--input-len", "200"), "requests of 328 tokens exceed max_model_len 256"),
    ],
)
def test_latency_flags_that_do_not_fit(model, capsys, flags, message):
    assert bench("latency", "--model", model, *flags) == 1
    assert message in capsys.readouterr().err


def test_startup_measures_processes(model, tmp_path, capsys):
    path = tmp_path / "startup.json"
    counts = ("--num-iters-cold", "1", "--num-iters-warmup", "0", "--num-iters-warm", "2")
    assert (
        bench("startup", "--model", model, "--device", "cpu", *counts, "--output-json", path) == 0
    )
    found = json.loads(path.read_text())
    assert len(found["cold_startup_times"]) == 1 and len(found["warm_startup_times"]) == 2
    assert found["avg_warm_startup_time"] == pytest.approx(np.mean(found["warm_startup_times"]))
    phases = found["warm_startup_phases"]
    assert list(phases) == ["interpreter", "import", "open", "weights", "engine"]
    assert sum(phases.values()) == pytest.approx(found["avg_warm_startup_time"])
    assert min(phases.values()) >= 0
    assert "Avg cold startup time: " in capsys.readouterr().out


def test_a_start_that_fails_is_told(model, capsys):
    with pytest.raises(EngineError, match=r"the start failed: ValueError: .*cpu_isa='mmx'"):
        start_once({"model": str(model), "device": "cpu", "cpu_isa": "mmx"})
    assert bench("startup", "--model", model, "--num-iters-warm", "0") == 1
    assert "--num-iters-warm 0 must be at least 1" in capsys.readouterr().err


def test_ablation_runs_three_schedules_on_equal_requests(model, tmp_path, capsys):
    path, png = tmp_path / "ablation.json", tmp_path / "ablation.png"
    load = ("--input-len", "12", "--output-len", "6", "--num-prompts", "8")
    outputs = ("--output-json", path, "--plot", png, "--result-dir", tmp_path / "results")
    assert bench("throughput", "--model", model, *load, "--ablate", *outputs) == 0
    found = json.loads(path.read_text())
    assert list(found["runs"]) == ["sequential", "nano", "overlap"]
    assert {run["total_num_tokens"] for run in found["runs"].values()} == {8 * 18}
    assert found["relative"]["sequential"] == 1
    overlap = found["runs"]["overlap"]["total_tok_s"]
    assert found["relative"]["overlap"] == overlap / found["runs"]["sequential"]["total_tok_s"]
    assert found["workload"] == "12x6"
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split()[0] for row in rows] == ["sequential", "nano", "overlap"]
    assert png.read_bytes().startswith(PNG_SIGNATURE)
    assert len(list((tmp_path / "results" / "cpu").iterdir())) == 3
    together = tmp_path / "together.png"
    plot_ablation.main([str(path), str(path), "--png", str(together)])
    assert together.read_bytes().startswith(PNG_SIGNATURE)
    with pytest.raises(SystemExit):
        plot_ablation.main([str(next((tmp_path / "results").rglob("*.json"))), "--png", "x.png"])
    assert "is no result of `nanoflow bench throughput --ablate`" in capsys.readouterr().err


def test_schedules_take_turns_in_one_steady_state(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steady_run, "SETTLE_SECONDS", 0.1)
    path = tmp_path / "ablation.json"
    load = ("--input-len", "12", "--output-len", "6", "--max-num-seqs", "8")
    steady = ("--steady-start", "--steady-seconds", "0.2", "--num-prompts", "20000")
    flags = (*load, *steady, "--ablate", "--output-json", path)
    assert bench("throughput", "--model", model, *flags) == 0
    found = json.loads(path.read_text())
    runs = found["runs"]
    assert list(runs) == ["sequential", "nano", "overlap"]
    begins = [run["phase_seconds"]["fill"] for run in runs.values()]
    assert len(set(begins)) == 1
    assert min(run["steady_state"]["seconds"] for run in runs.values()) >= 0.2
    assert {run["measured"] for run in runs.values()} == {"steady state"}
    for run in runs.values():
        windows = run["steady_state"]["windows"]
        assert len(windows) == 3
        for name in ("seconds", "steps", "prompt_tokens", "output_tokens"):
            assert sum(one[name] for one in windows) == pytest.approx(run["steady_state"][name])
    assert found["long_run_tok_s"].keys() == runs.keys()
    rows = capsys.readouterr().out.splitlines()[-3:]
    for row, rate in zip(rows, found["long_run_tok_s"].values(), strict=True):
        assert row.split()[5] == f"{rate:.0f}"


def test_any_schedules_are_compared(model, tmp_path, capsys):
    path, file = tmp_path / "found.json", tmp_path / "mine.json"
    content = schedule_to_json(built_in_schedule("overlap", 2))
    file.write_text(json.dumps(content | {"id": "mine"}))
    load = ("--input-len", "12", "--output-len", "6", "--num-prompts", "8")
    compared = ("--compare", "auto", "overlap", file, "--output-json", path)
    assert bench("throughput", "--model", model, *load, *compared) == 0
    found = json.loads(path.read_text())
    names = ["auto", "overlap", "mine"]
    assert list(found["relative"]) == list(found["runs"]) == names
    assert found["relative"]["auto"] == 1
    assert [found["runs"][name]["schedule"] for name in names] == names


def test_a_schedule_of_a_file_is_ablated_with_its_own_nano_batches(model, tmp_path):
    content = schedule_to_json(built_in_schedule("overlap", 2))
    for stage in ("qkv", "attn", "o", "mlp"):
        content["stages"][stage]["split"] = [0.25]
    path = tmp_path / "quarter.json"
    path.write_text(json.dumps(content | {"id": "quarter"}))
    arguments = {"model": str(model), "schedule": str(path), "device": "cpu", "cpu_threads": 2}
    sequential, nano, quarter = ablation_schedules(arguments)
    assert (sequential.id, nano.id, quarter.id) == ("sequential", "nano", "quarter")
    assert nano.cuts() == quarter.cuts() == [0.25] and sequential.cuts() == []
    assert [lane.width for lane in nano.lanes] == [2]


def test_the_built_in_nano_has_the_nano_batches_of_overlap():
    nano, overlap = built_in_schedule("nano", 8), built_in_schedule("overlap", 8)
    assert {name: stage.split for name, stage in nano.stages.items()} == {
        name: stage.split for name, stage in overlap.stages.items()
    }
    assert [(lane.name, lane.width) for lane in nano.lanes] == [("all", 8)]


def test_steady_rates_are_compared_where_there_are_some():
    rates = {"sequential": (100.0, 80.0), "overlap": (90.0, 100.0)}
    results = [
        {
            "schedule": name,
            "measured": "steady state",
            "total_tok_s": whole,
            "steady_total_tok_s": steady,
            "output_tok_s": 1.0,
            "step_ms": 2.0,
            "workload": "w",
            "model": "m",
            "device": "d",
        }
        for name, (whole, steady) in rates.items()
    ]
    found = compare(results)
    assert found["relative"] == {"sequential": 1.0, "overlap": 1.25}
    assert table(found).splitlines()[2].split() == ["overlap", "100", "1.250", "1", "2.00"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--plot", "x.png"), "--plot draws what --ablate or --compare finds: add one of them"),
        (("--ablate", "--compare", "nano"), "both say which schedules to run: give one of them"),
        (("--compare", "nano", "nano"), "schedules of different ids, not nano, nano"),
        (("--compare", "nano", "best"), "schedule 'best' is unknown"),
        (("--compare", "nano", "auto"), "--compare nano auto: auto can only be the first"),
        (
            ("--ablate", "--schedule", "nano"),
            "--ablate needs a schedule of several lanes; 'nano' has 1, so nothing overlaps",
        ),
        (("--ablate", "--schedule", "auto"), "schedule 'auto' is chosen by an LLM as it serves"),
    ],
)
def test_ablation_flags_that_do_not_fit(model, capsys, flags, message):
    assert bench("throughput", "--model", model, *flags) == 1
    assert message in capsys.readouterr().err
