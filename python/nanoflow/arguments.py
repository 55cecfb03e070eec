"""Command-line flags of the engine: vLLM's for the fields of `EngineArgs`, and SGLang's names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from nanoflow.config import EngineArgs

_HELP: Mapping[str, str] = MappingProxyType(
    {
        "model": "folder with safetensors, .gguf file, or Hugging Face repository",
        "tokenizer": "folder of another tokenizer than the model's own",
        "skip_tokenizer_init": "leave the tokenizer out: token ids in and out",
        "trust_remote_code": "not supported yet",
        "tensor_parallel_size": "devices that share every layer",
        "dtype": "auto, bfloat16, float16 or float32",
        "quantization": "not supported yet",
        "load_format": "auto, safetensors, gguf, or dummy for random weights",
        "revision": "of the Hugging Face repository",
        "seed": "of everything random",
        "gpu_memory_utilization": "share of all of a GPU's memory that this engine may use",
        "enable_sleep_mode": "as in vLLM; an engine can sleep without it",
        "enforce_eager": "run without captured graphs",
        "max_model_len": "tokens of prompt and output together: 4096, 32k, or auto for what fits "
        "(default: as many as the model allows, or fit)",
        "max_num_seqs": "requests that run at once (default: 256 on a CPU, 512 on a GPU)",
        "max_num_batched_tokens": "tokens of a step (default: 2048, or max_num_seqs if that is "
        "more)",
        "block_size": "tokens of a page of the KV cache",
        "kv_cache_memory_bytes": "size of the KV cache (default: on a GPU by "
        "gpu_memory_utilization, on a CPU 40%% of the free memory, at most 4 GiB)",
        "num_gpu_blocks_override": "pages of the KV cache",
        "device": "cpu, cuda, cuda:N, or auto for a GPU that can run the model, else the CPU",
        "cpu_threads": "threads of the CPU backend; 0 for all this process may use",
        "cpu_isa": "instruction set of the CPU backend; auto for the best there is",
        "schedule": "sequential, nano, overlap, tp-overlap, a JSON file, or auto for the "
        "fastest that is found",
        "enable_chunked_prefill": "split long prompts over several steps",
        "enable_prefix_caching": "share the KV cache of equal beginnings (default: True)",
        "kv_offloading_size": "GiB of host memory that keep what the KV cache has no room for "
        "(default: none)",
        "kv_offloading_backend": "native",
        "kv_offloading_ssd": "PATH:SIZE, a folder on an SSD and GiB, for what the host gives up",
        "async_scheduling": "plan a step while the one before it runs",
        "scheduling_policy": "fcfs, or priority: requests with a lower one go first",
        "batch_invariant": "the same tokens for a request whatever runs beside it; slower on a GPU",
        "max_num_queued_reqs": "requests that may wait; more are rejected",
        "max_num_queued_tokens": "prompt tokens that may wait; requests beyond are rejected",
        "disable_log_stats": "log no line of status every few seconds",
    }
)
_MEASURED_ONLY = frozenset({"simulated_tensor_parallel_size"})  # a flag of `bench throughput`
# Other names of a flag, SGLang's among them.
_ALIASES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "model": ("--model-path",),
        "tokenizer": ("--tokenizer-path",),
        "tensor_parallel_size": ("-tp", "--tp", "--tp-size"),
        "quantization": ("-q",),
        "max_model_len": ("--context-length",),
        "max_num_seqs": ("--max-running-requests",),
        "max_num_batched_tokens": ("--chunked-prefill-size", "--max-prefill-tokens"),
        "block_size": ("--page-size",),
        "max_num_queued_reqs": ("--max-queued-requests",),
    }
)
# SGLang's switches: the field and what it becomes.
_SWITCHES: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "--disable-cuda-graph": ("enforce_eager", True),
        "--disable-radix-cache": ("enable_prefix_caching", False),
        "--disable-overlap-schedule": ("async_scheduling", False),
    }
)


class ArgumentParser(argparse.ArgumentParser):
    """Takes flags with underscores as with hyphens, and no abbreviated ones."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_hyphenated(word) for word in words], namespace)


def _hyphenated(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def add_engine_arguments(
    parser: argparse.ArgumentParser, names: Iterable[str] | None = None
) -> None:
    """Adds the flags of these fields of EngineArgs, of all without `names`.

    A flag that is not given sets nothing, so that the defaults stay those of EngineArgs.
    """
    group = parser.add_argument_group("engine")
    every = (field.name for field in fields(EngineArgs) if field.name not in _MEASURED_ONLY)
    chosen = tuple(every if names is None else names)
    hints = get_type_hints(EngineArgs)
    defaults = {field.name: field.default for field in fields(EngineArgs)}
    for name in chosen:
        flags = [f"--{name.replace('_', '-')}", *_ALIASES.get(name, ())]
        text = _HELP[name]
        if defaults[name] not in (MISSING, None):
            text += f" (default: {defaults[name]})"
        group.add_argument(
            *flags,
            dest=name,
            default=argparse.SUPPRESS,
            help=text,
            **_conversion(name, hints[name]),
        )
    for flag, (name, value) in _SWITCHES.items():
        if name in chosen:
            group.add_argument(
                flag,
                dest=name,
                action="store_const",
                const=value,
                default=argparse.SUPPRESS,
                help=f"--{'' if value else 'no-'}{name.replace('_', '-')}",
            )


def engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of LLM() that were given."""
    names = (field.name for field in fields(EngineArgs))
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def _conversion(name: str, hint: Any) -> dict[str, Any]:
    """How argparse reads a value of this type, and what it calls it."""
    types = set(get_args(hint)) or {hint}
    if bool in types:
        return {"action": argparse.BooleanOptionalAction}
    if str in types:
        kind: object = _integer_or_text if int in types else str
    else:
        kind = int if int in types else float
    return {"type": kind, "metavar": name.rpartition("_")[2].upper()}


def _integer_or_text(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text
