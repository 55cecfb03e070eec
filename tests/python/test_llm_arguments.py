"""Arguments of an LLM: what each wrong one says, and the sizes that follow from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nanoflow import LLM
from nanoflow.config import EngineArgs, make_args, parse_length
from nanoflow.limits import derive_limits
from nanoflow.memory import MemoryUse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trust_remote_code": True}, "trust_remote_code=True is not supported yet"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 must be at least 1"),
        ({"quantization": "fp8"}, "quantization='fp8'"),
        ({"device": "tpu"}, "device='tpu' is unknown; known: auto, cpu, cuda, cuda:N"),
        ({"enable_chunked_prefill": False}, "enable_chunked_prefill=False"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"max_num_seqs": 2**31}, "max_num_seqs=2147483648 must be at most 2147483647"),
        ({"kv_cache_memory_bytes": 10**15}, r"pages of 64 .*bytes\), but at most 2147483647 are"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_seqs=9 is above max_num_b"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization=1\.5"),
        ({"max_model_len": "long"}, "max_model_len='long' is no number of tokens"),
        ({"cpu_threads": -1}, "cpu_threads=-1"),
        ({"cpu_isa": "mmx"}, "cpu_isa='mmx' does not run here; this CPU has"),
        ({"dtype": "int4"}, "int4"),
        ({"load_format": "pt"}, "pt"),
        ({"schedule": "best"}, "schedule 'best' is unknown"),
        ({"max_model_len": 257}, "max_model_len=257 is above the model's 256 positions"),
        (
            {"max_model_len": 256, "kv_cache_memory_bytes": 100_000},
            r"max_model_len=256 needs 131072 bytes of KV cache, but the cache holds 192 tokens "
            r"\(3 pages of 64, kv_cache_memory_bytes\); lower max_model_len to 192 or raise kv_c",
        ),
        (
            {"num_gpu_blocks_override": 3, "max_model_len": 256},
            "or raise num_gpu_blocks_override to 4",
        ),
    ],
)
def test_a_wrong_argument_is_named(model: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(model, **arguments)


@pytest.mark.parametrize(
    ("argument", "value", "what"),
    [
        ("enforce_eager", "yes", "True or False"),
        ("enable_prefix_caching", 1, "True or False or None"),
        ("tensor_parallel_size", True, "an integer"),
        ("max_num_seqs", 2.0, "an integer or None"),
        ("gpu_memory_utilization", "0.5", "a number"),
        ("kv_offloading_size", "4", "a number or None"),
        ("dtype", None, "a text"),
        ("schedule", 3, "a text or a path or a Schedule"),
    ],
)
def test_an_argument_of_another_type_is_named(argument: str, value: Any, what: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"{argument}={value!r} must be {what}") + "$"):
        LLM("model", **{argument: value})


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match="no argument 'max_seqs'; did you mean 'max_num_seqs'"):
        LLM("model", max_seqs=3)
    with pytest.raises(FileNotFoundError, match=r"gone"):
        LLM("/gone/model.gguf")


def test_lengths_may_be_written_short() -> None:
    lengths = {text: parse_length("x", text) for text in ("4096", "32k", "32K", "1.5k", "auto")}
    assert lengths == {"4096": 4096, "32k": 32_000, "32K": 32_768, "1.5k": 1500, "auto": -1}
    assert parse_length("x", None) is None


def test_sizes_follow_from_model_and_memory() -> None:
    def limits(free: int = 10**12, **arguments: Any) -> tuple[int, int, int, int]:
        args: EngineArgs = make_args({"model": "x", **arguments})
        memory = MemoryUse(
            device="cpu", total=free + 1000, in_use=500, weights=500, workspace=0, graphs=0
        )
        sizes = derive_limits(args, memory, model_max_len=8192, kv_bytes_per_token=1000)
        return (
            sizes.max_num_batched_tokens,
            sizes.max_num_seqs,
            sizes.max_model_len,
            sizes.num_pages,
        )

    cache = (4 << 30) // 64_000
    assert limits() == (2048, 256, 8192, cache)
    assert limits(max_num_seqs=2) == (2048, 2, 8192, cache), "pages of ended requests are of use"
    without = {"enable_prefix_caching": False}
    assert limits(max_num_seqs=2, **without) == (2048, 2, 8192, 256)
    assert limits(max_num_batched_tokens=100, **without) == (100, 100, 8192, 12_800)
    assert limits(max_num_seqs=3000)[:2] == (3000, 3000)
    assert limits(free=100_000_000) == (2048, 256, 8192, 625)
    assert limits(free=10_000_000) == (2048, 256, 3968, 62)
    assert limits(max_model_len="auto", kv_cache_memory_bytes=640_000)[2:] == (640, 10)
    assert limits(num_gpu_blocks_override=1000, max_model_len=100)[2:] == (100, 1000)
