"""bench/multi_round.py on a tiny model: what its JSON says of tiers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import multi_round


def test_all_modes_say_the_same_and_tiers_compute_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    sizes = {
        "--shape": "tiny",
        "--conversations": "10",
        "--rounds": "5",
        "--think": "0.01",
        "--scale": "0.1",
        "--block-size": "4",
        "--num-pages": "100",
        "--max-model-len": "400",
        "--host-gib": "0.01",
        "--small-host-gib": "0.001",
        "--unique": "3",
        "--commit": "abc",
        "--output-json": str(path),
    }
    monkeypatch.setattr(
        sys, "argv", ["multi_round.py", *(w for pair in sizes.items() for w in pair)]
    )
    multi_round.main()
    result = json.loads(path.read_text())
    rows = {row["mode"]: row for row in result["results"]}
    assert list(rows) == list(multi_round.MODES)
    assert result["conversations_said_as_in_the_first_mode"] == [1.0] * 4
    computed = {mode: row["prefill_tokens_computed"] for mode, row in rows.items()}
    assert computed["host"] < computed["prefix"] < computed["off"]
    beside = result["beside_off"]
    assert beside["host"]["times_less_prefill"] == computed["off"] / computed["host"] >= 3
    assert beside["prefix"]["throughput"] == (
        rows["prefix"]["total_tokens_per_second"] / rows["off"]["total_tokens_per_second"]
    )
    assert (result["commit"], result["gpu"]) == ("abc", None)
    assert rows["host"]["bytes_per_second"].keys() == {"GPU_to_CPU", "CPU_to_GPU"}
    assert {"GPU_to_CPU", "CPU_to_SSD"} <= rows["host+ssd"]["bytes_per_second"].keys()
    for mode in ("host", "host+ssd"):
        cost = result["without_reuse"][mode]
        assert cost["lost"] < 1 and 0 <= cost["device_idle"] <= 1
        assert rows[mode]["metrics"]["kv_offload_hits:host"] > 0
