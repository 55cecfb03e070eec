"""How the memory of a GPU is shared out, with the sizes of real ones, and what is said when it does
not do."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow.config import EngineLimits, make_args
from nanoflow.limits import check_free, derive_limits
from nanoflow.memory import GRAPH_BYTES, MemoryUse

MIB = 1 << 20
# An H100 of 80 GB, as CUDA tells it once a process has its context there.
H100_TOTAL, H100_IN_USE = 81_079 * MIB, 520 * MIB
LLAMA_8B = {"model_max_len": 131_072, "kv_bytes_per_token": 131_072}
LLAMA_8B_WEIGHTS = 16_060_522_496
# tests/cpp/workspace_test.cc holds the buffers of 512 requests and 2048 rows to 776 MiB, and a lane
# has 64 MiB; the rest is what allocations are rounded up by, and a second lane.
LLAMA_8B_WORKSPACE = (776 + 2 * 64) * MIB


def h100(**changes: Any) -> MemoryUse:
    sizes = {
        "device": "cuda:0",
        "total": H100_TOTAL,
        "in_use": H100_IN_USE,
        "weights": LLAMA_8B_WEIGHTS,
        "workspace": LLAMA_8B_WORKSPACE,
        "graphs": GRAPH_BYTES,
    }
    return MemoryUse(**(sizes | changes))


def limits_of(memory: MemoryUse, **arguments: Any) -> EngineLimits:
    args = make_args({"model": "llama", "device": "cuda", **arguments})
    limits = derive_limits(args, memory, **LLAMA_8B)
    check_free(args, memory, limits, limits.page_size * LLAMA_8B["kv_bytes_per_token"])
    return limits


def test_an_8b_model_on_80_gb_has_463k_tokens() -> None:
    """vLLM has 463k of them with the same share of the memory."""
    limits = limits_of(h100())
    assert limits.num_pages * limits.page_size >= 463_000
    assert limits == EngineLimits(2048, 512, 131_072, 64, limits.num_pages)
    cache = limits.num_pages * 64 * 131_072
    used = LLAMA_8B_WEIGHTS + LLAMA_8B_WORKSPACE + GRAPH_BYTES + cache
    assert 0.92 * H100_TOTAL - 64 * 131_072 < used <= 0.92 * H100_TOTAL


def test_the_share_is_of_all_memory_whatever_others_use() -> None:
    assert limits_of(h100(in_use=5000 * MIB)) == limits_of(h100())
    half = limits_of(h100(in_use=40_000 * MIB), gpu_memory_utilization=0.5)
    assert half.num_pages == (H100_TOTAL // 2 - h100().own) // (64 * 131_072)


def test_the_table_adds_up() -> None:
    memory = h100(kv_cache=50_000 * MIB, num_pages=6250, page_size=64)
    assert memory.tokens == 400_000
    assert memory.table() == (
        "Memory of cuda:0, MiB\n"
        "  total               81,079\n"
        "  in use before          520  the driver and other processes\n"
        "  weights             15,317\n"
        "  workspace              904\n"
        "  graphs                 256  reserved\n"
        "  KV cache            50,000  6,250 pages, 400,000 tokens\n"
        "  left                14,082"
    )


@pytest.mark.parametrize(
    ("memory", "arguments", "message"),
    [
        (
            h100(),
            {"gpu_memory_utilization": 0.2},
            r"even the shortest request needs 8388608 bytes .* holds 0 tokens \(0 pages of 64, "
            r"0 bytes: 20% of the memory \(gpu_memory_utilization\), less 17\d+ bytes for all "
            r"else\); raise gpu_memory_utilization to 0\.21 or more\nMemory of cuda:0, MiB\n",
        ),
        (
            h100(),
            {"gpu_memory_utilization": 0.3, "max_model_len": 131_072},
            r"max_model_len=131072 needs 17179869184 bytes .*; raise gpu_memory_utilization to "
            r"0\.41 or more\nMemory",
        ),
        (
            h100(in_use=60_000 * MIB, device="cuda:3"),
            {"gpu_memory_utilization": 0.3, "max_model_len": 131_072},
            r"lower max_model_len to \d+\nMemory of cuda:3",
        ),
        (
            h100(weights=H100_TOTAL),
            {},
            r"the model needs a device with more memory free\nMemory",
        ),
        (
            h100(in_use=30_000 * MIB),
            {},
            r"a KV cache of 58\d\d\d MiB does not fit in the 34602 MiB that are left; lower "
            r"gpu_memory_utilization to 0\.62, or end what else uses the device\nMemory",
        ),
        (
            h100(),
            {"kv_cache_memory_bytes": 70_000 * MIB},
            r"a KV cache of 70000 MiB .*; lower kv_cache_memory_bytes to 67\d+\nMemory",
        ),
        (
            h100(),
            {"num_gpu_blocks_override": 10_000},
            r"a KV cache of 80000 MiB .*; lower num_gpu_blocks_override to 80\d\d\nMemory",
        ),
        (
            h100(),
            {"kv_cache_memory_bytes": 1},
            r"even the shortest request needs .*; raise kv_cache_memory_bytes to 8388608$",
        ),
    ],
)
def test_too_little_memory_names_the_argument_and_its_value(
    memory: MemoryUse, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        limits_of(memory, **arguments)
    change = message.split(r"\n")[0]
    if r"gpu_memory_utilization to 0\." in change:
        share = float(change.rpartition("utilization to ")[2][:5].replace("\\", ""))
        limits_of(memory, **(arguments | {"gpu_memory_utilization": share}))  # as said, it works
