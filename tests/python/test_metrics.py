"""What is counted, over the fake engine and on a tiny model, and the line of status."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nanoflow.metrics as metrics
from nanoflow import LLM, SamplingParams, batch_runner
from nanoflow.cli import main
from nanoflow.energy import EnergyMeter, open_meter
from nanoflow.metrics import Counter, Gauge, Histogram, Metric, StatusLine, make_metrics
from nanoflow.scheduler.idle import IdleMeter
from nanoflow.scheduler.stats import EngineTimes
from test_loop import check_nothing_leaked, serve
from tiny_models import write_tiny_llama


def by_name(found: list[Metric]) -> dict[str, Any]:
    """Values, and of request_success by reason."""
    values: dict[str, Any] = {}
    for metric in found:
        assert metric.labels["engine"] == "0" and metric.labels["model_name"] == "tiny"
        name = metric.name.removeprefix("nanoflow:")
        if isinstance(metric, Counter | Gauge):
            reason = metric.labels.get("finished_reason")
            values[name if reason is None else f"{name}:{reason}"] = metric.value
        else:
            values[name] = metric
    return values


def test_every_token_and_end_is_counted(blind: None) -> None:
    service = serve((0.5,), early=np.random.default_rng(0), invalid_seeds=frozenset({2}))
    requests = [service.request(n, 1 + n % 20) for n in range(60)]
    requests.append(service.request(7))  # an id in use, which fails
    service.loop.submit(requests)
    service.loop.abort(["50", "51"])
    service.wait(61)
    check_nothing_leaked(service)
    values = by_name(make_metrics(service.state.stats(), "tiny"))
    begun = [request for request in requests if request.output_token_ids]
    assert values["generation_tokens"] == sum(len(r.output_token_ids) for r in begun)
    assert values["prompt_tokens"] == sum(len(r.prompt_token_ids) for r in begun)
    assert values["num_preemptions"] == sum(r.num_preemptions for r in requests) > 0
    for reason in ("stop", "length", "abort", "error"):
        expected = sum(request.finish_reason == reason for request in requests)
        assert values[f"request_success:{reason}"] == expected > 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert values[name] == 0
    times = values["scheduler_step_time_seconds"]
    assert isinstance(times, Histogram)
    assert times.count == service.engine.submitted == times.buckets["+Inf"]
    assert times.sum > 0 and list(times.buckets.values()) == sorted(times.buckets.values())


def test_requests_that_fail_with_the_engine_are_counted() -> None:
    service = serve(fail_at=(4, 9))
    service.loop.submit([service.request(n, ignore_eos=True) for n in range(20)])
    service.wait(20)
    service.loop.close()
    values = by_name(make_metrics(service.state.stats(), "tiny"))
    assert values["request_success:error"] == 20


def test_an_llm_tells_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_llama(tmp_path / "tiny", tokenizer=True)
    monkeypatch.chdir(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    seen: list[dict[str, Any]] = []
    with LLM("tiny", max_model_len=64, block_size=8, max_num_seqs=4, device="cpu") as llm:
        llm.step_listener = lambda _: seen.append(by_name(llm.get_metrics()))
        prompts = ["again and again and again and again " * 2] * 6
        outputs = llm.generate(prompts, params, use_tqdm=False)
        values = by_name(llm.get_metrics())
    assert values["prompt_tokens"] == sum(len(o.prompt_token_ids) for o in outputs)
    assert values["generation_tokens"] == 48
    assert values["request_success:length"] == 6
    hits = sum(output.num_cached_tokens for output in outputs)
    assert values["prefix_cache_hits"] == values["prompt_tokens_cached"] == hits > 0
    assert values["prefix_cache_queries"] == values["prompt_tokens"]
    assert max(value["num_requests_running"] for value in seen) == 4
    assert max(value["num_requests_waiting"] for value in seen) == 2
    assert 0 < max(value["kv_cache_usage_perc"] for value in seen) <= 1


def test_a_line_of_status_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = serve()
    service.loop.close()
    now, stats = 100.0, service.state.stats()
    monkeypatch.setattr(metrics, "perf_counter", lambda: now)
    line, silent = StatusLine(lambda: stats), StatusLine(lambda: stats, is_on=False)

    def tick(seconds: float, **changes: Any) -> list[str]:
        nonlocal now, stats
        now, stats = now + seconds, replace(stats, **changes)
        caplog.clear()
        line.tick()
        silent.tick()
        return caplog.messages

    with caplog.at_level(logging.WARNING):
        assert tick(50) == []
    with caplog.at_level(logging.INFO):
        assert tick(0) == []
        assert tick(9.9) == []
        changes = {"prompt_tokens": 1000, "generation_tokens": 50, "running": 3, "waiting": 2}
        cache = {"kv_cache_usage": 0.125, "prefix_queries": 80, "prefix_hits": 20}
        assert tick(0.1, preemptions=1, **changes, **cache) == [
            "Avg prompt throughput: 100.0 tokens/s, Avg generation throughput: 5.0 tokens/s, "
            "Running: 3 reqs, Waiting: 2 reqs, KV cache usage: 12.5%, "
            "Prefix cache hit rate: 25.0%, Preemptions: 1, Device idle: at most 0.0%"
        ]
        assert tick(5) == []
        assert "Preemptions: 0" in tick(15)[0]
        assert tick(100) == [], "an idle time is no time to average over"
        assert len(tick(10)) == 1


def was_told(capsys: pytest.CaptureFixture[str]) -> bool:
    """Status is told when requests end, so that those in their place may not run yet."""
    told = capsys.readouterr().err
    return re.search(r"Avg generation throughput: [1-9].*Running: [0-2] reqs", told) is not None


@pytest.mark.parametrize("shows", [True, False])
def test_status_is_shown_beside_the_bar_of_a_long_run(
    shows: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # As in a program that has not set logging up, which pytest has.
    monkeypatch.setattr(logging.getLogger("nanoflow"), "propagate", False)
    monkeypatch.setattr(metrics, "STATUS_SECONDS", 0.05)
    monkeypatch.setattr(batch_runner, "STATUS_SECONDS", 0.01)
    model = write_tiny_llama(tmp_path, tokenizer=True)
    params = SamplingParams(max_tokens=40, ignore_eos=True, detokenize=False)
    with LLM(model, max_model_len=64, block_size=8, max_num_seqs=2, device="cpu") as llm:
        llm.generate([[1, 2, 3]] * 80, params, use_tqdm=shows)
    assert was_told(capsys) == shows
    source = tmp_path / "in.jsonl"
    body = {"prompt": [1, 2, 3], "max_tokens": 40, "ignore_eos": True}
    request = {"method": "POST", "url": "/v1/completions", "body": body}
    lines = [json.dumps({"custom_id": str(number), **request}) for number in range(80)]
    source.write_text("\n".join(lines))
    files = ["-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--model", str(model)]
    sizes = ["--max-model-len", "64", "--block-size", "8", "--max-num-seqs", "2"]
    bar = [] if shows else ["--no-progress"]
    assert main(["run-batch", *files, *sizes, *bar, "--device", "cpu"]) == 0
    assert was_told(capsys) == shows
    assert not logging.getLogger("nanoflow").handlers


class FakeNvml:
    NVMLError = RuntimeError

    def __init__(self) -> None:
        self.millijoules = 0.0
        self.is_lost = False

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:
        if self.is_lost:
            raise self.NVMLError("lost")
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if self.is_lost:
            raise self.NVMLError("lost")
        return 206_000


def test_the_energy_of_all_gpus_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = serve()
    service.loop.close()
    now, stats = 100.0, service.state.stats()
    monkeypatch.setattr(metrics, "perf_counter", lambda: now)
    nvml = FakeNvml()
    meter = EnergyMeter(nvml, ["gpu 0", "gpu 1"])
    line = StatusLine(lambda: stats, meter=meter)
    with caplog.at_level(logging.INFO):
        line.tick()
        now, nvml.millijoules = now + 10, 2_500_000
        times = EngineTimes(open=10.0, idle=0.05)
        stats = replace(stats, prompt_tokens=90_000, generation_tokens=10_000, engine_times=times)
        line.tick()
    assert caplog.messages[-1].endswith("Device idle: at most 0.5%, GPU: 500 W, 0.050 J/token")
    values = by_name(make_metrics(stats, "tiny", meter))
    assert (values["gpu_energy_joules"], values["gpu_power_watts"]) == (5000, 412)
    nvml.is_lost = True
    assert "gpu_energy_joules" not in by_name(make_metrics(stats, "tiny", meter))
    assert open_meter("cpu") is None


def test_the_time_a_device_may_have_idled_is_bounded() -> None:
    class Handle:
        step, done = 1, False

        def is_done(self) -> bool:
            return self.done

        def wait(self) -> Any: ...

    times, handle = EngineTimes(), Handle()
    meter = IdleMeter(times)
    meter.wake(10.0)
    meter.submit(10.5, None)  # planning the first step
    meter.submit(11.0, handle)  # the second, while the first runs
    assert times.idle == 0.5
    meter.waited(12.0)
    meter.submit(12.25, handle)
    assert times.idle == 0.5
    meter.waited(13.0)
    handle.done = True
    meter.submit(13.75, handle)  # too late: it was done some time between 13 and now
    assert (times.idle, times.open) == (1.25, 3.0)
    meter.wake(100.0)
    meter.waited(101.0)
    assert times.open == 4.0
