"""nanoflow beside its peers: the arguments, the sums, and a peer that runs on a tiny model."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

import compare
import cpu_peak
from nanoflow.bench.datasets import Request
from nanoflow.loading import open_checkpoint


def parse(*flags: str) -> list[compare.Engine]:
    return compare.parse_engines(compare.make_parser().parse_args(["--model", "m", *flags]))


def test_engines_are_nanoflows_schedules_and_the_peers():
    peers = ("--peer", "vllm=/a/python", "--peer", "transformers-f32=/b/python")
    settings = ("--set", "transformers-f32.dtype=float32", "--set", "vllm.max_num_seqs=64")
    found = parse("--schedule", "overlap", "my/best.json", *peers, *settings)
    assert [(one.name, one.kind, one.python, one.options) for one in found] == [
        ("nanoflow-overlap", "nanoflow", sys.executable, {"schedule": "overlap"}),
        ("nanoflow-best", "nanoflow", sys.executable, {"schedule": "my/best.json"}),
        ("vllm", "vllm", "/a/python", {"max_num_seqs": 64}),
        ("transformers-f32", "transformers", "/b/python", {"dtype": "float32"}),
    ]


def test_a_setting_of_a_kind_is_one_of_all_its_engines():
    found = parse("--set", "nanoflow.max_num_seqs=8")
    assert [one.options["max_num_seqs"] for one in found] == [8, 8]


REQUESTS = [Request([5] * 10, 4), Request([6] * 20, 6)]


def test_rates_are_of_the_median_round():
    tokens = [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]
    other = [[1, 2, 9, 4], [1, 2, 3, 4, 5, 6]]
    runs: dict[str, Any] = {
        "nanoflow-sequential": {"seconds": [2.0], "tokens": tokens},
        "nanoflow-overlap": {"seconds": [1.0, 5.0, 1.5], "tokens": tokens},
        "vllm": {"seconds": [3.0], "tokens": other},
    }
    found = compare.summary(runs, REQUESTS, gflop=30.0, peak=40.0)
    overlap, vllm = found["engines"]["nanoflow-overlap"], found["engines"]["vllm"]
    assert overlap["median_seconds"] == 1.5
    assert (overlap["total_tok_s"], overlap["output_tok_s"]) == pytest.approx((40 / 1.5, 10 / 1.5))
    assert overlap["share_of_gemm_peak"] == pytest.approx(0.5)
    assert overlap["equal_tokens"] == 1
    assert vllm["equal_tokens"] == pytest.approx(8 / 10)  # up to the first difference
    assert found["nanoflow_over_peer"] == {"vllm": pytest.approx(2.0)}


def test_work_is_that_of_the_matrix_products(model):
    config = open_checkpoint(model).model
    heads = (config.num_heads + config.num_kv_heads) * 2 * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    layers, head = 38 * config.num_layers * layer, 10 * config.vocab_size * config.hidden_size
    assert compare.gflop_of(config, REQUESTS) == pytest.approx(2e-9 * (layers + head))


def test_the_peak_is_the_highest_rate(monkeypatch):
    monkeypatch.setattr(cpu_peak, "SHAPES", ((64, 96, 64), (32, 64, 128)))
    found = cpu_peak.measure_peak(threads=1, seconds=0.005)
    assert set(found["rates"]) == {"nanoflow", "torch"}
    rates = [rate for rates in found["rates"].values() for rate in rates.values()]
    assert len(rates) == 2 * len(cpu_peak.SHAPES)
    assert found["gflops"] == max(rates) and min(rates) > 0.001


LOAD = ("--input-len", "9", "--output-len", "6", "--random-range-ratio", "0.5")


def test_nanoflow_and_transformers_generate_the_same(model, tmp_path, capsys):
    path = tmp_path / "compare.json"
    flags = ("--peer", f"transformers={sys.executable}", "--dtype", "float32", "--threads", "1")
    sizes = ("--num-prompts", "5", "--schedule", "overlap", "--peak-seconds", "0")
    settings = ("--set", "transformers.batch_size=3", "--output-json", str(path))
    arguments = ["--model", str(model), *LOAD, *flags, *sizes, *settings]
    assert compare.main(arguments) == 0
    found = json.loads(path.read_text())
    assert list(found["engines"]) == ["nanoflow-overlap", "transformers"]
    transformers = found["engines"]["transformers"]
    assert transformers["equal_tokens"] == 1
    assert transformers["options"] == {"batch_size": 3}
    assert transformers["versions"]["torch"]
    assert len(transformers["seconds"]) == 1 and transformers["load_seconds"] > 0
    assert found["gemm_peak"] is transformers["share_of_gemm_peak"] is None
    assert "best nanoflow beside transformers: " in capsys.readouterr().out


FAST = ("--schedule", "sequential", "--peak-seconds", "0")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--peer", "tgi=python"), "--peer tgi=python must be NAME=PYTHON, NAME of vllm, sglang"),
        (("--peer", "vllm"), "--peer vllm must be NAME=PYTHON"),
        (("--peer", "vllm=a", "--peer", "vllm=b"), "names occur twice: "),
        (("--set", "vllm.x=1"), "--set vllm.x=1 must be NAME.OPTION=VALUE, NAME of nanoflow-seq"),
        (("--rounds", "0"), "--rounds 0 and --threads"),
        (("--num-prompts", "0"), "--num-prompts 0 must be at least 1"),
        (("--input-len", "400"), "exceed max_model_len 256"),
        (("--model", "no-folder"), "no-folder is no folder; peers read safetensors"),
        (("--peer", "vllm=/no/python"), "vllm: cannot run /no/python"),
        (("--peer", f"vllm={sys.executable}"), "vllm ended with 1:"),
    ],
)
def test_what_does_not_work_is_told(model, capsys, flags, message):
    load = ("--num-prompts", "2", "--input-len", "4", "--output-len", "2")
    common = ["--model", str(model), *load, *FAST]
    assert compare.main([*common, *flags]) == 1
    assert message in capsys.readouterr().err
