"""bench/over_admission.py on a tiny model: the rules differ as they do in the simulation."""

from __future__ import annotations

import json
from pathlib import Path

import over_admission


def test_the_forecast_preempts_few_and_vllms_rule_many(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    sizes = ["--num-prompts", "100", "--input-len", "64", "--output-len", "256"]
    sizes += ["--kv-tokens", "7680", "--max-num-seqs", "64", "--max-num-batched-tokens", "256"]
    over_admission.main([*sizes, "--commit", "abc", "--output-json", str(path)])
    result = json.loads(path.read_text())
    assert (result["commit"], result["kv_tokens"], result["model"]) == ("abc", 7680, "tiny")
    forecast, vllm = result["results"]
    assert (forecast["admission"], vllm["admission"]) == ("forecast", "vllm")
    assert vllm["preempted"] > 0.3 and forecast["preempted"] < 0.05
    assert vllm["recomputed_tokens"] > 5 * forecast["recomputed_tokens"]
    assert vllm["most_running"] > forecast["most_running"]
    assert forecast["steady_pages_granted"] > 0.8
