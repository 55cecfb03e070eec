"""What benchmarks read from a GPU, on made-up readings."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import has_cuda
from nanoflow import _core
from nanoflow.bench import gpu_profile, result, telemetry
from nanoflow.bench.ceiling import gemm_ceiling_tflops
from nanoflow.bench.gpu_profile import Kernel, ProfileError, Profiler, kernels_of, summarize
from nanoflow.bench.steady import SteadyState
from nanoflow.bench.telemetry import Power, Sample, Telemetry, power
from nanoflow.config import EngineArgs
from nanoflow.energy import EnergyMeter, open_boards, open_meter
from nanoflow.errors import EngineError
from nanoflow.models.llama import parse_config


def test_power_is_energy_by_time():
    samples = [Sample(t, 100 + 500 * t, 1000 + 100 * t) for t in range(6)]
    assert power(samples, 0.5, 3.5) == Power(500, 1200)
    assert power(samples, 0.5, 1.5) is None


def test_power_is_told_between_moments_at_which_energy_was_counted():
    """By a board that counts ten times a second, at any time of the window's."""
    samples = [Sample(t / 100, 50.0 * (t // 10), 1500) for t in range(300)]
    for begin in (0.513, 0.55, 0.588):
        assert power(samples, begin, begin + 1.0) == Power(pytest.approx(500), 1500)
    assert power(samples, 0.513, 0.65) is None


BUS_IDS = ("0000:3B:00.0", "0000:19:00.0")  # of CUDA's devices, in the order CUDA has chosen


def fake_bus_id(index: int) -> str:
    if index >= len(BUS_IDS):
        raise EngineError("there is no such device")
    return BUS_IDS[index]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "cuda_bus_id", fake_bus_id)


class FakeNvml:
    """Handles are bus ids. A board's energy grows at every call, by 1 J, on the second one 10."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    def __init__(self, calls_before_failure: int = 10**9) -> None:
        self.calls = 0
        self.calls_before_failure = calls_before_failure

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        return bus_id

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.calls += 1
        if self.calls > self.calls_before_failure:
            raise self.NVMLError("lost")
        return 1000 * self.calls * (10 if handle == BUS_IDS[1] else 1)

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return 1700 if handle == BUS_IDS[1] else 1500


def test_spans_count_by_their_length():
    readings = Telemetry("cpu")
    readings.samples += [Sample(0.1 * i, 30.0 * i, 1500) for i in range(11)]
    readings.samples += [Sample(1 + 0.1 * i, 300 + 60.0 * i, 1200) for i in range(1, 21)]
    found = readings.mean_power([(0.0, 1.0), (1.05, 3.05)])
    assert found is not None
    assert found.watts == pytest.approx((300 + 2 * 600) / 3)
    assert found.sm_mhz == pytest.approx((1500 + 2 * 1200) / 3)
    assert readings.mean_power([(0.0, 1.0), (5.0, 6.0)]) is None


def test_samples_while_it_is_entered(monkeypatch, two_gpus):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setattr(telemetry, "SAMPLES_PER_SECOND", 1000)
    with Telemetry("cuda") as readings:
        while len(readings.samples) < 5:
            pass
    assert readings.reason is None
    assert readings.board == {"driver": "580.1", "boards": 1, "power_limit_watts": 700}
    assert [sample.joules for sample in readings.samples[:3]] == [1, 2, 3]
    found = readings.power(readings.samples[0].time, readings.samples[-1].time)
    assert found is not None and found.sm_mhz == 1500


def test_sums_the_boards_of_all_ranks(monkeypatch, two_gpus):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    readings = Telemetry("cuda:0", ranks=2)
    assert (readings.board["boards"], readings.board["power_limit_watts"]) == (2, 1400)
    assert [(sample.joules, sample.sm_mhz) for sample in readings.samples] == [(1 + 20, 1600)]


def test_says_why_there_are_no_samples(monkeypatch, two_gpus):
    assert Telemetry("cpu").reason == "only GPUs are sampled"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'nanoflow[bench]'" in str(Telemetry("cuda").reason)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(calls_before_failure=0))
    assert Telemetry("cuda").reason == "NVML: lost"
    assert Telemetry("cuda:2").reason == "there is no such device"


@pytest.mark.parametrize(
    ("device", "ranks", "boards"),
    [("cuda", 1, BUS_IDS[:1]), ("cuda:1", 1, BUS_IDS[1:]), ("cuda:0", 2, BUS_IDS)],
)
def test_boards_are_those_that_cuda_runs_on(monkeypatch, two_gpus, device, ranks, boards):
    nvml = FakeNvml()
    assert open_boards(nvml, device, ranks) == list(boards)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = open_meter(device, ranks)
    assert isinstance(meter, EnergyMeter)
    assert open_meter("cuda:1", 2) is None, "there is no third board"


@pytest.mark.skipif(not has_cuda(), reason="no GPU that nanoflow can use")
def test_cuda_tells_the_bus_id_that_nvml_knows():
    nvml = pytest.importorskip("pynvml")
    [board] = open_boards(nvml, "cuda", 1)
    name = nvml.nvmlDeviceGetName(board)
    assert name in _core.Backend("cuda").description


def test_a_build_or_machine_without_the_device_says_so():
    with pytest.raises(EngineError):
        _core.cuda_bus_id(99)


def event(name: str, begin: float, length: float, **more: Any) -> dict[str, Any]:
    whole = {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": length, "tid": 7}
    return whole | {"args": {"device": 1}} | more


def test_finds_kernels_in_a_trace():
    events = [
        event("late", 5, 1),
        event("early", 1, 2),
        event("copy", 0, 9, cat="gpu_memcpy"),
        event("of another GPU", 2, 9, args={"device": 2}),
        {"ph": "M", "name": "process_name"},
    ]
    assert kernels_of(events) == [Kernel("early", 7, 1, 3), Kernel("late", 7, 5, 6)]


def steps(count: int) -> list[Kernel]:
    """Steps of 100 µs: gemm 20, norm 10, gemm 40, norm 10, other 15 beside the last norm."""
    kernels = []
    for at in range(0, 100 * count, 100):
        for name, stream, begin, end in (
            ("gemm", 1, 0, 20),
            ("norm", 1, 20, 30),
            ("gemm", 1, 30, 70),
            ("norm", 1, 70, 80),
            ("other", 2, 72, 87),
        ):
            kernels.append(Kernel(name, stream, at + begin, at + end))
    return kernels


def test_sums_up_the_kernels_of_a_step(monkeypatch):
    monkeypatch.setattr(gpu_profile, "CONTEXT", 2)
    profile = summarize(steps(100), step_ms=0.1)
    assert profile.kernel_sum_ms == pytest.approx(0.095, rel=0.02)
    assert profile.busy_ms == pytest.approx(0.087, rel=0.02)
    assert profile.gpu_idle_pct == pytest.approx(13, abs=1)
    longest = profile.kernels[0]
    assert (longest["name"], longest["after"]) == ("gemm", "norm")
    assert longest["us_per_step"] == pytest.approx(60, rel=0.03)


def test_says_how_much_of_the_network_is_hidden():
    """Per 100 µs 50 of collectives: 30 beside products, 20 with nothing else running."""
    kernels = []
    for at in range(0, 10_000, 100):
        kernels += [Kernel("gemm", 1, at, at + 60), Kernel("ncclDevKernel", 2, at + 30, at + 80)]
    profile = summarize(kernels, step_ms=0.1)
    assert profile.network_ms == pytest.approx(0.05, rel=0.02)
    assert profile.network_alone_ms == pytest.approx(0.02, rel=0.02)
    assert profile.network_hidden_pct == pytest.approx(60, abs=1)
    assert summarize(steps(100), step_ms=0.1).network_hidden_pct is None


def test_tells_kernels_of_one_name_apart_by_those_before_them():
    profile = summarize(steps(100), step_ms=0.1)
    assert len([kernel for kernel in profile.kernels if kernel["name"] == "gemm"]) == 1
    kernels = [Kernel("head", 1, k.begin_us, k.end_us) if i % 5 == 3 else k
               for i, k in enumerate(steps(100))]  # fmt: skip
    profile = summarize(kernels, step_ms=0.1)
    gemms = [kernel for kernel in profile.kernels if kernel["name"] == "gemm"]
    assert [(gemm["after"], round(gemm["mean_us"])) for gemm in gemms] == [
        ("norm", 40), ("head", 20)
    ]  # fmt: skip
    assert all(gemm["runs_per_step"] == pytest.approx(1, abs=0.03) for gemm in gemms)


def test_a_record_without_kernels_is_no_profile():
    with pytest.raises(ProfileError, match="no kernel was recorded"):
        summarize([], 1.0)


def test_profiling_needs_torch_and_a_gpu(monkeypatch):
    no_gpu = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", no_gpu)
    with pytest.raises(ProfileError, match="torch sees no GPU"):
        Profiler()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ProfileError, match="torch is not installed"):
        Profiler()


def test_the_ceiling_is_measured_on_any_device():
    assert gemm_ceiling_tflops("cpu", rows=16, features=64, depth=32, seconds=0.05) > 0


@pytest.mark.parametrize(
    ("description", "gpu", "folder"),
    [
        ("cuda:0 (NVIDIA H100 80GB HBM3, 132 SMs)", "NVIDIA H100 80GB HBM3", "h100"),
        ("cuda:1 (NVIDIA H200, 132 SMs)", "NVIDIA H200", "h200"),
        ("cpu (2 threads, amx)", None, "cpu"),
    ],
)
def test_results_lie_with_their_gpu(description, gpu, folder):
    assert result.gpu_name(description) == gpu
    assert result.gpu_folder(gpu) == folder


def test_result_files_are_named_by_what_was_run(tmp_path):
    found = {"gpu": None, "model": "llama-3.1-8b", "workload": "512x512"}
    found |= {"schedule": "overlap", "measured": "steady state"}
    assert result.result_path(tmp_path, found) == tmp_path / "cpu" / "512x512-overlap.json"
    found |= {"model": "llama-2-7b", "measured": "whole run"}
    name = "llama-2-7b-512x512-overlap-whole.json"
    assert result.result_path(tmp_path, found).name == name
    assert result.schedule_name(EngineArgs(model="m", schedule="a/best.json")) == "best"


def test_counts_the_work_of_matrix_products():
    model = parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 100,
            "hidden_size": 8,
            "intermediate_size": 10,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
    )
    state = SteadyState(2.0, 5, 1000, 500, mean_input=200, mean_output=100)
    # weights: q 64, k and v 32 each, o 64, mlp 240; head 800
    flop = 2 * (1495 * 3 * (64 + 2 * 32 + 64 + 240) + 500 * 800)
    assert result.matrix_tflops(model, state) == pytest.approx(flop / 2 * 1e-12)
    mixture = dataclasses.replace(model, num_experts=5, experts_per_token=2)
    flop += 2 * (1495 * 3 * (240 + 5 * 8))  # another expert, and the router
    assert result.matrix_tflops(mixture, state) == pytest.approx(flop / 2 * 1e-12)


def test_energy_says_why_it_is_missing():
    assert result.energy(Power(690, 1700), None, 23000)["j_per_token"] == 0.03
    assert result.energy(None, None, 5)["telemetry_reason"] == "too short for two samples"
