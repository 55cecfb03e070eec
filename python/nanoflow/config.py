"""What an LLM is made with: vLLM's names and defaults, checked once."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_type_hints

from nanoflow._core import Schedule

DEFAULT_GPU_MEMORY_UTILIZATION = 0.92
NOT_INVARIANT = (
    "several GPUs add their parts in an order that depends on how many rows a step has; one GPU "
    "keeps it, and the CPU with any number of ranks"
)
AUTO = -1  # of max_model_len: what the cache holds, at most what the model allows
MAX_SIZE = 2**31 - 1  # the engine counts in 32 bits
_WORDS: Mapping[Any, str] = MappingProxyType(
    {
        bool: "True or False",
        int: "an integer",
        float: "a number",
        str: "a text",
        Path: "a path",
        Schedule: "a Schedule",
        NoneType: "None",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    """Arguments of an LLM. Sizes in tokens unless said otherwise."""

    model: str | Path
    tokenizer: str | Path | None = None  # None: the model's own
    skip_tokenizer_init: bool = False  # prompts are token ids and there is no text
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1  # ranks: GPUs from `device` on, or shares of a CPU's threads
    # Of measurements: one rank of so many, the collectives of which copy its own data instead; 0 is
    # none. What it generates makes no sense.
    simulated_tensor_parallel_size: int = 0
    dtype: str = "auto"
    quantization: str | None = None
    load_format: str = "auto"
    revision: str | None = None
    seed: int = 0
    gpu_memory_utilization: float = DEFAULT_GPU_MEMORY_UTILIZATION  # of a GPU, for this LLM
    enable_sleep_mode: bool = False  # vLLM's; sleep() needs no preparation here
    enforce_eager: bool = False  # run without captured graphs, which the CPU has none of
    max_model_len: int | str | None = None  # prompt and output; "32k"; "auto" or -1: what fits
    max_num_seqs: int | None = None  # requests that run at once
    max_num_batched_tokens: int | None = None  # tokens of a step
    block_size: int = 64  # tokens of a page of the KV cache
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None  # pages of the KV cache, whatever they take
    device: str = "auto"  # a GPU that can run the model, else the CPU; or cpu, cuda, cuda:1
    cpu_threads: int = 0  # 0: all that this process may use
    cpu_isa: str = "auto"
    schedule: str | Path | Schedule = "auto"  # on a GPU the best found, on a CPU sequential
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool | None = None  # None is True
    kv_offloading_size: float | None = None  # GiB of host memory for pages of the KV cache
    kv_offloading_backend: str = "native"
    kv_offloading_ssd: str | None = None  # PATH:SIZE, a folder and GiB, for what the host gives up
    async_scheduling: bool = True  # plan a step while the one before it runs
    scheduling_policy: str = "fcfs"  # or priority: requests with a lower one go first
    batch_invariant: bool = False  # a request's tokens depend on nothing beside it
    max_num_queued_reqs: int | None = None  # that wait; more are rejected
    max_num_queued_tokens: int | None = None  # of their prompts
    disable_log_stats: bool = False  # no status line every few seconds

    def __post_init__(self) -> None:
        self._check_types()
        self._check_supported()
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_num_queued_reqs",
            "max_num_queued_tokens",
            "num_gpu_blocks_override",
            "block_size",
            "tensor_parallel_size",
        ):
            _check_positive(name, getattr(self, name), MAX_SIZE)
        _check_positive("kv_cache_memory_bytes", self.kv_cache_memory_bytes)
        is_on_gpus = self.device.startswith("cuda") and self.tensor_parallel_size > 1
        if self.batch_invariant and is_on_gpus:
            raise ValueError(
                f"batch_invariant=True with device={self.device!r} and "
                f"tensor_parallel_size={self.tensor_parallel_size}: {NOT_INVARIANT}"
            )
        self._check_simulated()
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} must be above 0, at most 1"
            )
        if not 0 <= self.cpu_threads <= MAX_SIZE:
            raise ValueError(f"cpu_threads={self.cpu_threads} must be at least 0")
        parse_length("max_model_len", self.max_model_len)
        self._check_offloading()
        if self.max_num_seqs is not None and self.max_num_batched_tokens is not None:
            self._check_rows(self.max_num_seqs, self.max_num_batched_tokens)

    def _check_types(self) -> None:
        for name, hint in get_type_hints(EngineArgs).items():
            value, types = getattr(self, name), get_args(hint) or (hint,)
            fitting = (*types, int) if float in types else types
            if not isinstance(value, fitting) or (isinstance(value, bool) and bool not in types):
                what = " or ".join(_WORDS[one] for one in types)
                raise TypeError(f"{name}={value!r} must be {what}")

    def _check_supported(self) -> None:
        supported: dict[str, tuple[Any, ...]] = {
            "trust_remote_code": (False,),
            "scheduling_policy": ("fcfs", "priority"),
            "quantization": (None,),
            "enable_chunked_prefill": (True,),
            "kv_offloading_backend": ("native",),
        }
        if re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is None:
            raise ValueError(f"device={self.device!r} is unknown; known: auto, cpu, cuda, cuda:N")
        for name, values in supported.items():
            value = getattr(self, name)
            if value not in values:
                known = " and ".join(map(repr, values))
                raise ValueError(f"{name}={value!r} is not supported yet; supported: {known}")

    def _check_offloading(self) -> None:
        size = self.kv_offloading_size
        if size is not None and self.tensor_parallel_size > 1:
            raise ValueError(
                f"kv_offloading_size={size} needs tensor_parallel_size=1, not "
                f"{self.tensor_parallel_size}"
            )
        if self.kv_offloading_ssd is not None:
            parse_ssd(self.kv_offloading_ssd)
            if size is None:
                raise ValueError("kv_offloading_ssd needs kv_offloading_size: pages go through it")
        if size is None:
            return
        if not 0 < size < float("inf"):
            raise ValueError(f"kv_offloading_size={size} must be a number of GiB above 0")
        if self.enable_prefix_caching is False:
            raise ValueError(
                "kv_offloading_size needs enable_prefix_caching: pages are found by what they hold"
            )

    def _check_simulated(self) -> None:
        size = self.simulated_tensor_parallel_size
        if size < 0:
            raise ValueError(f"simulated_tensor_parallel_size={size} must be at least 0")
        if size and self.tensor_parallel_size > 1:
            raise ValueError(
                f"simulated_tensor_parallel_size={size} is for one rank of them, not for "
                f"tensor_parallel_size={self.tensor_parallel_size}"
            )

    @property
    def ranks(self) -> int:
        """That share a step, simulated ones among them."""
        return self.simulated_tensor_parallel_size or self.tensor_parallel_size

    def check_priority(self, priority: int) -> None:
        """Raises ValueError, or TypeError, on a priority that a request cannot have."""
        if type(priority) is not int:
            raise TypeError(f"priority={priority!r} must be an integer")
        if priority != 0 and self.scheduling_policy != "priority":
            raise ValueError(f"priority={priority} needs scheduling_policy='priority'")
        if not -(2**31) <= priority < 2**31:
            raise ValueError(f"priority={priority} must be from {-(2**31)} to {2**31 - 1}")

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


def check_timeout(timeout: float | None) -> float:
    """Seconds, infinity for None. Raises ValueError, or TypeError, on what is no time to wait."""
    if timeout is None:
        return math.inf
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout={timeout!r} must be a number of seconds")
    if not timeout > 0:
        raise ValueError(f"timeout={timeout} must be above 0 seconds")
    return float(timeout)


def parse_ssd(argument: str) -> tuple[Path, int]:
    """The folder and the bytes of PATH:SIZE. A size is GiB, or has a unit as in 500M, 20GiB, 1T."""
    path, _, size = argument.rpartition(":")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", size.strip(), re.IGNORECASE)
    if not path or match is None or float(match[1]) == 0:
        raise ValueError(
            f"kv_offloading_ssd={argument!r} is no PATH:SIZE such as /mnt/ssd/kv:200 (GiB)"
        )
    unit = {"K": 10, "M": 20, "G": 30, "T": 40}[(match[2] or "G").upper()]
    return Path(path).expanduser(), int(float(match[1]) * (1 << unit))


def _check_positive(name: str, value: int | None, most: int | None = None) -> None:
    if value is None:
        return
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    if most is not None and value > most:
        raise ValueError(f"{name}={value} must be at most {most}")
