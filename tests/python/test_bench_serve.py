"""Arrivals, what clients see, and the command `bench serve` on a tiny model."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from nanoflow.arguments import ArgumentParser
from nanoflow.async_llm import AsyncLLM
from nanoflow.bench.command import add_bench_arguments
from nanoflow.bench.datasets import Request
from nanoflow.bench.serve_metrics import Served, details, lines, summary
from nanoflow.bench.serve_run import Ramp, arrival_times, ramp_times, serve
from nanoflow.cli import run_command
from nanoflow.sampling_params import SamplingParams


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0)])
def test_gaps_between_arrivals_have_the_rate_and_the_burstiness(burstiness, variation):
    times = arrival_times(20_000, 5.0, burstiness, np.random.default_rng(0))
    gaps = np.diff(times, prepend=0.0)
    assert times[-1] == pytest.approx(20_000 / 5.0)
    assert gaps.min() >= 0
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.03)


def test_an_infinite_rate_is_all_at_once():
    assert arrival_times(3, math.inf, 1.0, np.random.default_rng(0)) == [0.0] * 3


def test_rates_grow_from_the_first_request_to_the_last():
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(Ramp("linear", 2.0, 8.0).rates(4), [2, 4, 6, 8])
    np.testing.assert_allclose(Ramp("exponential", 2.0, 16.0).rates(4), [2, 4, 8, 16])
    times = np.array(ramp_times(Ramp("linear", 1.0, 100.0), 20_000, 1.0, rng))
    assert times[0] > 0 and np.diff(times).min() >= 0
    first, last = np.diff(times[:2000]).mean(), np.diff(times[-2000:]).mean()
    assert first == pytest.approx(np.mean(1 / np.linspace(1, 11, 2000)), rel=0.1)
    assert last == pytest.approx(1 / 95, rel=0.1)


def test_metrics_are_those_of_each_request():
    # 4 tokens, in 3 pieces of news; 1 token, 2 seconds in.
    first = Served(prompt_len=10, start=1.0, news=[(1.5, 1), (1.7, 2), (2.0, 1)])
    second = Served(prompt_len=20, start=1.75, news=[(3.75, 1)])
    failed = Served(prompt_len=5, start=2.0, error="too long")
    found = summary(
        [first, second, failed], 4.0, percentiles=(50, 99), goodput={"ttft": 600}, slo_ms=500
    )
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 5)
    assert found["request_throughput"] == 0.5
    assert found["request_goodput"] == 0.25  # the second waited for its first token
    assert found["output_throughput"] == 1.25
    assert found["total_token_throughput"] == 8.75
    assert found["max_output_tokens_per_s"] == 3  # within second 1
    assert found["max_concurrent_requests"] == 2
    assert found["mean_ttft_ms"] == pytest.approx((500 + 2000) / 2)
    assert found["mean_tpot_ms"] == pytest.approx(500 / 3)  # of the first alone
    assert found["mean_itl_ms"] == pytest.approx((200 + 300) / 2)
    assert found["std_itl_ms"] == pytest.approx(50)
    assert found["p99_e2el_ms"] == pytest.approx(np.percentile([1000, 2000], 99))
    # 1 s over 4 tokens, 2 s over 1
    assert found["mean_normalized_latency_ms"] == pytest.approx((250 + 2000) / 2)
    assert not found["within_slo"]
    assert found["requests_within_slo"] == 0.5
    more = details([first, second, failed])
    assert more["output_lens"] == [4, 1, 0]
    assert more["itls"][0] == pytest.approx([0.2, 0.3])
    assert more["errors"] == ["", "", "too long"]
    assert more["ttfts"] == pytest.approx([0.5, 2.0, 0.0])


def test_one_token_each_has_no_time_per_further_token():
    found = summary([Served(1, 0.0, [(0.1, 1)])], 1.0)
    assert found["mean_tpot_ms"] == found["p99_itl_ms"] == 0
    assert found["within_slo"] and found["request_goodput"] is None
    printed = lines(found, ["ttft"], [99])
    assert "Mean TTFT (ms):                          100.00" in printed
    assert "goodput" not in printed and "TPOT" not in printed


def test_nothing_completed_is_an_error():
    with pytest.raises(ValueError, match="none of 1 requests completed; the first: too long"):
        summary([Served(1, 0.0, error="too long")], 1.0)


GREEDY = SamplingParams(temperature=0, ignore_eos=True)


def test_requests_arrive_in_time_and_fail_alone(model):
    llm = AsyncLLM(model, max_model_len=64)
    requests = [Request([5] * 8, 6), Request([5] * 80, 6), Request([6] * 8, 4)]
    try:
        served, duration = asyncio.run(serve(llm, requests, [0.0, 0.05, 0.2], params=GREEDY))
    finally:
        llm.shutdown()
    assert [one.output_len for one in served] == [6, 0, 4]
    assert [one.start for one in served] == [0.0, 0.05, 0.2]
    assert served[1].error is not None and "80" in served[1].error
    assert served[2].news[0][0] > 0.2
    assert duration >= served[2].end
    assert served[0].text and served[2].text


def test_no_more_requests_than_allowed_are_on_their_way(model):
    llm = AsyncLLM(model)
    requests = [Request([5] * 8, 6)] * 5
    try:
        served, duration = asyncio.run(
            serve(llm, requests, [0.0] * 5, params=GREEDY, max_concurrency=2)
        )
    finally:
        llm.shutdown()
    found = summary(served, duration)
    assert found["max_concurrent_requests"] == 2
    assert sorted(one.start for one in served)[2] > min(one.end for one in served)


def bench(*arguments: str | Path) -> int:
    parser = ArgumentParser(prog="bench")
    add_bench_arguments(parser)
    return run_command(parser, [str(argument) for argument in arguments])


RAMP = ("--ramp-up-start-rps", "50", "--ramp-up-end-rps", "200")
LOAD = ("--input-len", "8", "--output-len", "5", "--num-prompts", "6", "--ignore-eos")


def test_serve_command_writes_vllms_fields(model, tmp_path, capsys):
    flags = ("--request-rate", "200", "--goodput", "e2el:60000", "--num-warmups", "2")
    flags += ("--temperature", "0.5", "--top-k", "9")
    saving = ("--save-result", "--save-detailed", "--result-dir", tmp_path, "--label", "tiny")
    more = ("--metadata", "host=here", "--percentile-metrics", "ttft,e2el")
    percentiles = ("--metric-percentiles", "50,95")
    assert bench("serve", "--model", model, *LOAD, *flags, *saving, *more, *percentiles) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^=+ Serving Benchmark Result =+$", printed, re.MULTILINE)
    assert re.search(r"^Successful requests: +6$", printed, re.MULTILINE)
    assert re.search(r"^P95 E2EL \(ms\): +[\d.]+$", printed, re.MULTILINE)
    assert "ITL" not in printed
    (path,) = tmp_path.glob("tiny-200.0qps-*.json")
    run = json.loads(path.read_text())
    assert run["backend"] == run["endpoint_type"] == "nanoflow"
    assert (run["num_prompts"], run["request_rate"], run["burstiness"]) == (6, 200.0, 1.0)
    assert (run["completed"], run["failed"], run["host"]) == (6, 0, "here")
    assert (run["total_input_tokens"], run["total_output_tokens"]) == (48, 30)
    assert run["request_goodput"] == run["request_throughput"] > 0
    assert run["output_lens"] == [5] * 6
    for metric in ("ttft", "tpot", "itl", "e2el", "normalized_latency"):
        for statistic in ("mean", "median", "std", "p50", "p95"):
            assert run[f"{statistic}_{metric}_ms"] >= 0
    assert run["median_ttft_ms"] <= run["median_e2el_ms"]
    assert run["traffic"] == "8x5"
    assert (run["temperature"], run["top_k"], run["top_p"]) == (0.5, 9, 1.0)
    assert run["ignore_eos"]


def test_serve_runs_every_rate(model, tmp_path, capsys):
    path = tmp_path / "rates.json"
    flags = ("--request-rate", "100", "inf", "--output-json", path, "--append-result")
    saving = ("--result-dir", tmp_path, "--result-filename", "runs.jsonl")
    assert bench("serve", "--model", model, *LOAD, *flags, *saving) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split()[0] for row in rows] == ["100.0", "inf"]
    assert all(row.endswith("met") for row in rows)
    found = json.loads(path.read_text())
    assert found["max_request_rate_within_slo"] == "inf"
    assert [run["request_rate"] for run in found["runs"]] == [100.0, "inf"]
    appended = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert appended == found["runs"]


def test_serve_ramps_up_and_counts_who_found_the_queue_full(model, tmp_path):
    path = tmp_path / "ramp.json"
    flags = ("--ramp-up-strategy", "linear", *RAMP, "--output-json", path)
    flags += ("--repetition-penalty", "1.2")
    assert bench("serve", "--model", model, *LOAD, *flags) == 0
    run = json.loads(path.read_text())
    assert (run["completed"], run["failed"], run["request_rate"]) == (6, 0, "inf")
    assert (run["ramp_up_strategy"], run["ramp_up_end_rps"]) == ("linear", 200.0)
    assert run["repetition_penalty"] == 1.2
    few = ("--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--output-json", path)
    assert bench("serve", "--model", model, *LOAD, *few) == 0
    run = json.loads(path.read_text())
    assert run["failed"] > 0 and run["completed"] + run["failed"] == 6


def test_a_duration_gives_each_rate_its_number_of_requests(model, tmp_path):
    path = tmp_path / "rates.json"
    flags = ("--request-rate", "20", "60", "--duration", "0.2", "--output-json", path)
    assert bench("serve", "--model", model, *LOAD[:4], *flags) == 0
    runs = json.loads(path.read_text())["runs"]
    assert [run["num_prompts"] for run in runs] == [4, 12]
    assert all(run["duration"] > 0.19 for run in runs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--duration", "5"), "--duration 5.0 must be above 0, and needs a --request-rate below"),
        (
            ("--duration", "5", "--request-rate", "1", "--num-prompts", "5"),
            "--duration and --num-prompts both say how many requests: give one",
        ),
        (("--request-rate", "0"), "request rate 0.0 and burstiness 1.0 must be above 0"),
        (("--burstiness", "-1"), "burstiness -1.0 must be above 0"),
        (("--ramp-up-end-rps", "9"), "--ramp-up-end-rps need --ramp-up-strategy"),
        (("--ramp-up-strategy", "linear"), "in this order, not None and None"),
        (
            ("--ramp-up-strategy", "exponential", "--request-rate", "3", *RAMP),
            "--ramp-up-strategy and --request-rate both say the rate: give one",
        ),
        (("--top-p", "2"), "top_p"),
        (("--max-concurrency", "0"), "--max-concurrency 0 must be at least 1"),
        (("--goodput", "ttft"), "--goodput ttft must be METRIC:MILLISECONDS"),
        (("--goodput", "speed:5"), "--goodput has 'speed'; there are ttft, tpot, itl, e2el"),
        (("--percentile-metrics", "ttft,x"), "--percentile-metrics has 'x'"),
        (("--metric-percentiles", "101"), "--metric-percentiles 101 must be numbers from 0 to 100"),
        (("--metadata", "here"), "--metadata here must be KEY=VALUE"),
        (
            ("--request-rate", "1", "2", "--result-filename", "x.json"),
            "--result-filename is one file for several rates: add --append-result",
        ),
        (("--input-len", "300"), "exceed max_model_len 256"),
    ],
)
def test_serve_flags_that_do_not_fit_are_told(model, capsys, flags, message):
    assert bench("serve", "--model", model, *flags) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
