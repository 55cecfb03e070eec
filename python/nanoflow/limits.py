"""The sizes of an engine, from its arguments, its model and the memory of its device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from nanoflow.config import AUTO, MAX_SIZE, EngineArgs, EngineLimits, parse_length
from nanoflow.memory import MemoryUse

DEFAULT_CPU_CACHE_BYTES = 4 << 30
CPU_CACHE_SHARE = 0.4  # of the free memory, at most
# Beside 512 decodes this leaves 1536 rows to prompts. The matrix products' rate grows little
# beyond 1024 rows (bench/results/h100), but buffers do: 64 KiB a row for an 8B model.
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
# Requests are admitted by the pages they are predicted to need, so that this many are a bound of
# tables and buffers, not a promise: no preemptions follow from a larger one. On a GPU of 80 GB the
# KV cache of an 8B model holds about 600 requests of 768 tokens; a step of 512 decodes and as many
# prompt tokens already runs the matrix products at their full rate.
DEFAULT_MAX_NUM_SEQS: Mapping[str, int] = MappingProxyType({"cpu": 256, "cuda": 512})


def derive_limits(
    args: EngineArgs, memory: MemoryUse, *, model_max_len: int, kv_bytes_per_token: int
) -> EngineLimits:
    """Sizes for a model whose positions end at `model_max_len`, with the memory that `memory`
    leaves for its KV cache.

    Without max_model_len, requests may be as long as the model allows, or as the cache holds where
    that is less. Raises ValueError on a max_model_len above either, and where there is no memory
    for any cache, with the numbers and the argument to change.
    """
    max_rows = args.max_num_batched_tokens or max(
        DEFAULT_MAX_NUM_BATCHED_TOKENS, args.max_num_seqs or 0
    )
    max_seqs = args.max_num_seqs or min(DEFAULT_MAX_NUM_SEQS[memory.kind], max_rows)
    asked = parse_length("max_model_len", args.max_model_len)
    if asked is not None and asked > model_max_len:
        raise ValueError(
            f"max_model_len={asked} is above the model's {model_max_len} positions "
            "(max_position_embeddings); lower max_model_len"
        )
    if asked is not None and asked != AUTO and asked < 2:
        raise ValueError(f"max_model_len={asked} must be at least 2: a prompt and an output token")
    page_bytes = kv_bytes_per_token * args.block_size
    cache_bytes, source = _cache_bytes(args, memory, page_bytes)
    pages = cache_bytes // page_bytes
    if pages > MAX_SIZE:
        raise ValueError(
            f"the KV cache has {pages} pages of {args.block_size} tokens ({source}), but at most "
            f"{MAX_SIZE} are possible; lower it to {MAX_SIZE * page_bytes} bytes"
        )
    held = pages * args.block_size
    max_len = max(min(model_max_len, held), 2) if asked in (None, AUTO) else asked
    if held < max_len:
        needed = -(-max_len // args.block_size) * page_bytes
        request = f"max_model_len={max_len}" if asked == max_len else "even the shortest request"
        raise ValueError(
            f"{request} needs {needed} bytes of KV cache, but the cache holds {held} tokens "
            f"({pages} pages of {args.block_size}, {source}); "
            + _what_to_change(args, memory, needed, page_bytes, held if asked == max_len else 0)
        )
    if args.enable_prefix_caching is False and args.num_gpu_blocks_override is None:
        # No more than what can run at once holds; with prefixes kept, every page is of use.
        pages = min(pages, max_seqs * -(-max_len // args.block_size))
    return EngineLimits(max_rows, max_seqs, max_len, args.block_size, pages)


def check_free(args: EngineArgs, memory: MemoryUse, limits: EngineLimits, page_bytes: int) -> None:
    """Raises ValueError where the KV cache of these limits is more than `memory` has left."""
    needed = limits.num_pages * page_bytes
    if needed <= memory.left:
        return
    pages = max(0, memory.left) // page_bytes
    if args.num_gpu_blocks_override is not None:
        change = f"lower num_gpu_blocks_override to {pages}"
    elif args.kv_cache_memory_bytes is not None:
        change = f"lower kv_cache_memory_bytes to {pages * page_bytes}"
    else:
        share = math.floor((memory.own + memory.left) / memory.total * 100) / 100
        change = f"lower gpu_memory_utilization to {share:.2f}, or end what else uses the device"
    raise ValueError(
        f"a KV cache of {needed >> 20} MiB does not fit in the {max(0, memory.left) >> 20} MiB "
        f"that are left; {change}\n{memory.table()}"
    )


def _cache_bytes(args: EngineArgs, memory: MemoryUse, page_bytes: int) -> tuple[int, str]:
    """How large the cache may be, and what says so.

    gpu_memory_utilization is meant as in vLLM: of all memory, and for this engine. What others use
    does not count, but has to leave that much free (`check_free`).
    """
    if args.num_gpu_blocks_override is not None:
        return args.num_gpu_blocks_override * page_bytes, "num_gpu_blocks_override"
    if args.kv_cache_memory_bytes is not None:
        return args.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    if memory.kind == "cuda":
        cache_bytes = max(0, int(args.gpu_memory_utilization * memory.total) - memory.own)
        return cache_bytes, (
            f"{cache_bytes} bytes: {args.gpu_memory_utilization:.0%} of the memory "
            f"(gpu_memory_utilization), less {memory.own} bytes for all else"
        )
    left = max(0, memory.total - memory.in_use - memory.weights)
    cache_bytes = min(DEFAULT_CPU_CACHE_BYTES, int(CPU_CACHE_SHARE * left))
    return cache_bytes, (
        f"{cache_bytes} bytes: {CPU_CACHE_SHARE:.0%} of the free memory, at most 4 GiB"
    )


def _what_to_change(
    args: EngineArgs, memory: MemoryUse, needed: int, page_bytes: int, shorter: int
) -> str:
    """For a cache of `needed` bytes, or else for requests of `shorter` tokens, where that helps."""
    lower = f"lower max_model_len to {shorter} or " if shorter >= 2 else ""
    if args.num_gpu_blocks_override is not None:
        return f"{lower}raise num_gpu_blocks_override to {needed // page_bytes}"
    if args.kv_cache_memory_bytes is not None or memory.kind == "cpu":
        return f"{lower}raise kv_cache_memory_bytes to {needed}"
    share = math.ceil((memory.own + needed) / memory.total * 100) / 100
    if needed <= memory.left and share <= 1:
        change = f"raise gpu_memory_utilization to {share:.2f} or more"
    elif shorter >= 2:
        change = f"lower max_model_len to {shorter}"
    else:
        change = "the model needs a device with more memory free"
    return f"{change}\n{memory.table()}"
