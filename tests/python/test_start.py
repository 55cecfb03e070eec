"""How an LLM starts: the device it takes, why it takes no other, its memory, and its phases."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import SMALL_CACHE, has_cuda
from nanoflow import LLM, SamplingParams, _core
from nanoflow.config import make_args
from nanoflow.devices import make_backends
from random_models import SHAPES, write_config
from tiny_models import write_tiny_llama

needs_gpu = pytest.mark.skipif(not has_cuda(), reason="no GPU that nanoflow can use")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head_dim of 16 is for the CPU."""
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


def start(model: Path, **arguments: object) -> LLM:
    return LLM(model, skip_tokenizer_init=True, max_model_len=64, **arguments)


def test_auto_takes_the_cpu_and_says_why(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is missing: the library, a driver, a device, or kernels for the model."""
    with caplog.at_level(logging.INFO), start(model) as llm:
        assert llm.device_description.startswith("cpu (")
        prompt = {"prompt_token_ids": [5, 6, 7]}
        [output] = llm.generate(prompt, SamplingParams(max_tokens=3), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 3
    reason = _core.cuda_problem() or "head_dim 16 has no GPU kernels; 64, 128 and 256 have"
    assert f"device='auto' takes the CPU: {reason}" in caplog.text


@pytest.mark.skipif(has_cuda(), reason="there is a GPU that nanoflow can use")
def test_a_gpu_that_cannot_be_used_is_an_error_that_says_why(model: Path) -> None:
    problem = _core.cuda_problem()
    assert problem.startswith("device 'cuda:0' ") and "use device='cpu'" in problem
    with pytest.raises(_core.EngineError) as raised:
        start(model, device="cuda")
    assert str(raised.value) == problem
    assert "device 'cuda:7' " in _core.cuda_problem(7)


def test_the_start_is_told_in_numbers(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"max_num_seqs": 4, "enable_prefix_caching": False}
    with caplog.at_level(logging.INFO), start(model, device="cpu", **sizes) as llm:
        memory, limits = llm.memory, llm.limits
        assert list(llm.start_seconds) == ["open", "weights", "engine"]
        assert all(seconds > 0 for seconds in llm.start_seconds.values())
    assert (memory.device, memory.graphs) == ("cpu", 0)
    assert memory.num_pages == limits.num_pages == 4
    assert memory.tokens == 4 * 64
    assert memory.kv_cache == memory.tokens * 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, D, f32
    assert memory.weights > 100_000 and memory.workspace > 1_000_000
    assert memory.left == memory.total - sum(
        (memory.in_use, memory.weights, memory.workspace, memory.kv_cache)
    )
    assert memory.table() in caplog.text
    assert "started: open " in caplog.text


def test_a_cpu_of_too_little_memory_says_what_to_lower(tmp_path: Path) -> None:
    write_config(tmp_path, **SHAPES["llama3-d64"] | {"vocab_size": 2_000_000_000})  # 1 TB
    with pytest.raises(_core.EngineError, match=r"need a device with more memory free\nMemory of"):
        start(tmp_path, load_format="dummy", device="cpu")


def test_buffers_of_too_many_rows_say_what_to_lower(model: Path) -> None:
    """Terabytes of them."""
    with pytest.raises(_core.EngineError, match=r"lower max_num_batched_tokens \(2000000000\)"):
        start(model, device="cpu", max_num_batched_tokens=2_000_000_000)


@needs_gpu
def test_auto_takes_a_gpu_for_models_that_it_runs(tmp_path: Path) -> None:
    write_config(tmp_path, **SHAPES["llama3-d64"])
    sizes = {"load_format": "dummy", "kv_cache_memory_bytes": SMALL_CACHE}
    with start(tmp_path, dtype="bfloat16", **sizes) as llm:
        assert llm.device_description.startswith("cuda:0 (")
    with start(tmp_path, dtype="float32", **sizes) as llm:
        assert llm.device_description.startswith("cpu (")
    with pytest.raises(ValueError, match="float32 has no GPU kernels"):
        start(tmp_path, dtype="float32", device="cuda", **sizes)


@needs_gpu
def test_a_device_that_does_not_exist_is_told() -> None:
    with pytest.raises(_core.EngineError, match=r"'cuda:31' does not exist: CUDA shows \d+ device"):
        make_backends(make_args({"model": "x", "device": "cuda:31"}))


@needs_gpu
def test_a_gpus_memory_is_measured(tmp_path: Path) -> None:
    write_config(tmp_path, **SHAPES["llama3-d64"])
    arguments = {"load_format": "dummy", "dtype": "bfloat16", "device": "cuda"}
    with start(tmp_path, kv_cache_memory_bytes=1 << 28, **arguments) as llm:
        memory = llm.memory
        backend = _core.Backend("cuda")
        assert memory.total == backend.total_memory
        # All is there, but for the graphs to come, host memory aside.
        assert abs(backend.free_memory - (memory.left + memory.graphs)) < 64 << 20
    with pytest.raises(ValueError, match=r"lower num_gpu_blocks_override to \d+\nMemory of cuda:0"):
        start(tmp_path, num_gpu_blocks_override=1 << 24, **arguments)


@needs_gpu
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="others take and give memory")
def test_a_killed_process_gives_its_gpu_back(tmp_path: Path) -> None:
    write_config(tmp_path, **SHAPES["llama3-d64"])
    code = (
        "import sys; from nanoflow import LLM\n"
        "llm = LLM(sys.argv[1], device='cuda', load_format='dummy', dtype='bfloat16',\n"
        "    skip_tokenizer_init=True, max_model_len=64, kv_cache_memory_bytes=1 << 30)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    backend = _core.Backend("cuda")
    before = backend.free_memory
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert backend.free_memory < before - (1 << 30)
        process.kill()
    deadline = time.monotonic() + 30
    while backend.free_memory < before - (64 << 20):
        assert time.monotonic() < deadline, "memory stays taken"
        time.sleep(0.1)
