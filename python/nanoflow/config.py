"""What an LLM is made with: vLLM's names and defaults, checked once."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nanoflow._core import Schedule

DEFAULT_GPU_MEMORY_UTILIZATION = 0.92
DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
DEFAULT_CPU_CACHE_BYTES = 4 << 30
CPU_CACHE_SHARE = 0.4  # of the free memory, at most
AUTO = -1  # of max_model_len: what the cache holds, at most what the model allows


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    """Arguments of an LLM. Sizes in tokens unless said otherwise."""

    model: str | Path
    tokenizer: str | Path | None = None  # None: the model's own
    skip_tokenizer_init: bool = False  # prompts are token ids and there is no text
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    quantization: str | None = None
    load_format: str = "auto"
    revision: str | None = None
    seed: int = 0
    gpu_memory_utilization: float = DEFAULT_GPU_MEMORY_UTILIZATION  # of a GPU's memory
    enforce_eager: bool = False  # run without captured graphs, which the CPU has none of
    max_model_len: int | str | None = None  # prompt and output; "32k"; "auto" or -1: what fits
    max_num_seqs: int | None = None  # requests that run at once
    max_num_batched_tokens: int | None = None  # tokens of a step
    block_size: int = 64  # tokens of a page of the KV cache
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None  # pages of the KV cache, whatever they take
    device: str = "auto"  # auto is the CPU; "cuda" or "cuda:1" for a GPU
    cpu_threads: int = 0  # 0: all that this process may use
    cpu_isa: str = "auto"
    schedule: str | Path | Schedule = "sequential"
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool | None = None  # None is True
    async_scheduling: bool = True  # plan a step while the one before it runs

    def __post_init__(self) -> None:
        self._check_supported()
        for name in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"):
            _check_positive(name, getattr(self, name))
        for name in ("num_gpu_blocks_override", "block_size"):
            _check_positive(name, getattr(self, name))
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} must be above 0, at most 1"
            )
        if type(self.cpu_threads) is not int or self.cpu_threads < 0:
            raise ValueError(f"cpu_threads={self.cpu_threads!r} must be an integer of at least 0")
        if type(self.seed) is not int:
            raise TypeError(f"seed={self.seed!r} must be an integer")
        if not isinstance(self.model, str | Path):
            raise TypeError(f"model={self.model!r} must be a path or the name of a repository")
        parse_length("max_model_len", self.max_model_len)
        if self.max_num_seqs is not None and self.max_num_batched_tokens is not None:
            self._check_rows(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def _check_supported(self) -> None:
        supported: dict[str, tuple[Any, ...]] = {
            "trust_remote_code": (False,),
            "tensor_parallel_size": (1,),
            "quantization": (None,),
            "enable_chunked_prefill": (True,),
        }
        if re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is None:
            raise ValueError(f"device={self.device!r} is unknown; known: auto, cpu, cuda, cuda:N")
        for name, values in supported.items():
            value = getattr(self, name)
            if value not in values:
                known = " and ".join(map(repr, values))
                raise ValueError(f"{name}={value!r} is not supported yet; supported: {known}")

    @staticmethod
    def _check_rows(max_num_seqs: int, max_num_batched_tokens: int) -> None:
        if max_num_seqs > max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs={max_num_seqs} is above max_num_batched_tokens="
                f"{max_num_batched_tokens}: a step must have a token for every running request"
            )


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The sizes an engine is made with; see pipeline/engine.h."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    page_size: int
    num_pages: int


def make_args(arguments: dict[str, Any]) -> EngineArgs:
    """Raises TypeError naming an argument that there is not, and the one probably meant."""
    names = [f.name for f in fields(EngineArgs)]
    for name in arguments:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(names)}"
            raise TypeError(f"LLM() has no argument {name!r}{hint}")
    return EngineArgs(**arguments)


def cpu_threads(args: EngineArgs) -> int:
    """Threads of the CPU backend: those asked for, else the CPUs this process may run on."""
    if args.cpu_threads:
        return args.cpu_threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_length(name: str, length: int | str | None) -> int | None:
    """A number of tokens: 4096, "4096", "32k" (1000s), "32K" (1024s), or AUTO as -1 or "auto"."""
    if length is None:
        return None
    if length in (AUTO, "auto"):
        return AUTO
    if isinstance(length, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", length.strip())
        if match is None:
            raise ValueError(
                f"{name}={length!r} is no number of tokens such as 4096, 32k or 'auto'"
            )
        unit = {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}[match[2]]
        length = int(float(match[1]) * unit)
    _check_positive(name, length)
    return length


def derive_limits(
    args: EngineArgs,
    *,
    model_max_len: int,
    kv_bytes_per_token: int,
    free_bytes: int,
    weight_bytes: int,
) -> EngineLimits:
    """Sizes for a model whose positions end at `model_max_len`.

    `free_bytes`: of the device, before the weights took `weight_bytes` of them.

    Without max_model_len, requests may be as long as the model allows, or as the cache holds where
    that is less. Raises ValueError on a max_model_len above either, with both numbers and the
    argument to change.
    """
    max_rows = args.max_num_batched_tokens or max(
        DEFAULT_MAX_NUM_BATCHED_TOKENS, args.max_num_seqs or 0
    )
    max_seqs = args.max_num_seqs or min(DEFAULT_MAX_NUM_SEQS, max_rows)
    asked = parse_length("max_model_len", args.max_model_len)
    if asked is not None and asked > model_max_len:
        raise ValueError(
            f"max_model_len={asked} is above the model's {model_max_len} positions "
            "(max_position_embeddings); lower max_model_len"
        )
    page_bytes = kv_bytes_per_token * args.block_size
    pages, source = _affordable_pages(args, page_bytes, free_bytes, weight_bytes)
    held = pages * args.block_size
    max_len = max(min(model_max_len, held), 2) if asked in (None, AUTO) else asked
    if max_len < 2:
        raise ValueError(
            f"max_model_len={max_len} must be at least 2: a prompt and an output token"
        )
    if held < max_len:
        is_override = args.num_gpu_blocks_override is not None
        raise ValueError(
            f"max_model_len={max_len} needs {max_len * kv_bytes_per_token} bytes of KV cache, but "
            f"the cache holds {held} tokens ({pages} pages of {args.block_size}, {source}); lower "
            "max_model_len or raise "
            + ("num_gpu_blocks_override" if is_override else "kv_cache_memory_bytes")
        )
    useful = max_seqs * -(-max_len // args.block_size)
    num_pages = args.num_gpu_blocks_override or min(pages, useful)
    return EngineLimits(max_rows, max_seqs, max_len, args.block_size, num_pages)


def _affordable_pages(
    args: EngineArgs, page_bytes: int, free_bytes: int, weight_bytes: int
) -> tuple[int, str]:
    """How many pages the cache may have, and what says so."""
    if args.num_gpu_blocks_override is not None:
        return args.num_gpu_blocks_override, "num_gpu_blocks_override"
    if args.kv_cache_memory_bytes is not None:
        return args.kv_cache_memory_bytes // page_bytes, "kv_cache_memory_bytes"
    if args.is_cuda:
        cache_bytes = max(0, int(args.gpu_memory_utilization * free_bytes) - weight_bytes)
        share = (
            f"{cache_bytes} bytes: {args.gpu_memory_utilization:.0%} of the free memory "
            "(gpu_memory_utilization), less the weights"
        )
        return cache_bytes // page_bytes, share
    left = max(0, free_bytes - weight_bytes)
    cache_bytes = min(DEFAULT_CPU_CACHE_BYTES, int(CPU_CACHE_SHARE * left))
    share = f"{cache_bytes} bytes: {CPU_CACHE_SHARE:.0%} of the free memory, at most 4 GiB"
    return cache_bytes // page_bytes, share


def _check_positive(name: str, value: int | None) -> None:
    if value is None:
        return
    if type(value) is not int:
        raise TypeError(f"{name}={value!r} must be an integer")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
