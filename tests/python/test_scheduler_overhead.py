"""bench/scheduler_overhead.py on few requests: what its JSON says of either engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import scheduler_overhead


@pytest.mark.parametrize("model", [[], ["--shape", "tiny", "--schedule", "sequential"]])
def test_steps_are_measured_with_all_that_should_run(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_overhead, "WARM_UP_STEPS", 2)
    path = tmp_path / "result.json"
    sizes = ["--running", "32", "--input-len", "16", "--output-len", "64", "--steps", "20"]
    words = [*sizes, *model, "--commit", "abc", "--output-json", str(path)]
    monkeypatch.setattr(sys, "argv", ["scheduler_overhead.py", *words])
    scheduler_overhead.main()
    result = json.loads(path.read_text())
    assert (result["commit"], result["gpu"]) == ("abc", None)
    [row] = result["results"]
    assert row["steps"] >= 10 and 0.95 * 32 <= row["mean_decode_tokens"] <= 32
    assert 0 < row["median_ms"] <= row["p99_ms"] and row["cpu_ms"] > 0
    if model:
        assert row["engine"].startswith("tiny on cpu") and 0 <= row["device_idle"] <= 1
    else:
        assert row["device_idle"] is None


def test_requests_that_never_run_together_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--running", "64", "--input-len", "512", "--output-len", "1", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["scheduler_overhead.py", *words])
    with pytest.raises(SystemExit, match="64 requests hardly ever ran together"):
        scheduler_overhead.main()
