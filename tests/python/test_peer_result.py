"""Results of peers, in nanoflow's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peer_result

RUN: dict[str, Any] = {
    "peer": "vllm",
    "version": "0.26.0",
    "work": "512x1024",
    "engine": "mbt=8192,seqs=512",
    "wall_s": 90.2,
    "mean_in": 512.0,
    "mean_out": 1024.0,
    "total_tok_s": 12000.0,
    "out_tok_s": 8000.0,
    "partial": True,
    "counters": {"counted_total_tok_s": 16000.0, "counted_out_tok_s": 10000.0},
    "max_num_seqs": 512,
    "watts": 690,
    "sm_mhz": 1650,
}

REPORTS = [  # prompt and generation tokens a second, requests running and waiting
    [30000.0, 4000.0, 400, 600],  # the ramp
    [19000.0, 8000.0, 512, 488],  # all slots in use at its end, not when it began
    [0.0, 14000.0, 500, 488],
    [20000.0, 8000.0, 512, 300],
    [9000.0, 10000.0, 507, 200],
    [8000.0, 9000.0, 510, 20],
    [7000.0, 13000.0, 512, 0],  # none waits any more
    [0.0, 12000.0, 30, 0],
]


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({}, 16000),  # counted; 10000 x 1.5 from the output
        ({"counters": {"counted_total_tok_s": 14000.0, "counted_out_tok_s": 10000.0}}, 15000),
        ({"counters": {}}, 12000),
        ({"reports": REPORTS}, 18000),
        ({"reports": REPORTS[:4]}, 16000),  # the last of these has only ended with all in use
        ({"reports": REPORTS, "max_num_seqs": 1024}, 16000),
    ],
)
def test_the_highest_rate_is_the_peers(changes: dict[str, Any], rate: float) -> None:
    assert peer_result.steady_total_tok_s(RUN | changes) == pytest.approx(rate)


def test_reports_count_between_two_moments_with_all_slots_in_use() -> None:
    assert peer_result.rates_at_full_load(RUN) == []
    assert peer_result.rates_at_full_load(RUN | {"reports": REPORTS}) == [19000, 17000]


def test_every_line_becomes_a_file(tmp_path: Path) -> None:
    lines = tmp_path / "vllm.jsonl"
    trace = RUN | {"work": "trace:chats.csv", "watts": None, "counters": {}, "partial": False}
    lines.write_text("\n".join(map(json.dumps, (RUN, trace))) + "\n")
    peer_result.main([str(lines), "--gpu", "NVIDIA H100 80GB HBM3", "--result-dir", str(tmp_path)])
    fixed = json.loads((tmp_path / "h100" / "512x1024-vllm-0.26.0.json").read_text())
    assert fixed["measured"] == "the first 90 s"
    assert fixed["j_per_token"] == 690 / 16000
    assert (fixed["workload"], fixed["schedule"]) == ("512x1024", "vllm-0.26.0")
    chats = json.loads((tmp_path / "h100" / "chats-vllm-0.26.0.json").read_text())
    assert (chats["j_per_token"], chats["measured"]) == (None, "all requests")
