"""The script that measures starts, on a tiny model."""

import json

import pytest

from test_docs import ROOT, load


def test_starts_are_told_by_phase_and_commit(tmp_path, capsys):
    path = tmp_path / "cold_start.json"
    flags = ["--shape", "tiny", "--device", "cpu", "--runs", "1", "--commit", "abc"]
    load(ROOT / "bench" / "cold_start.py").main([*flags, "--output-json", str(path)])
    found = json.loads(path.read_text())
    assert (found["commit"], found["model_id"]) == ("abc", "tiny")
    [run] = found["runs"]
    assert run == found["median_seconds"]
    assert min(run.values()) >= 0
    assert sum(run.values()) == pytest.approx(2 * run["total"])
    assert f"total        {run['total']:6.2f} s\n" in capsys.readouterr().out
