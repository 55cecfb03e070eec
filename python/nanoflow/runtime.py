"""From arguments to a running engine: open the model, size the cache, load, start the scheduler."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from nanoflow import _core
from nanoflow.config import (
    DEFAULT_GPU_MEMORY_UTILIZATION,
    EngineArgs,
    EngineLimits,
    cpu_threads,
    derive_limits,
)
from nanoflow.loading import Checkpoint, open_checkpoint
from nanoflow.models.config import ModelConfig
from nanoflow.schedule import find_schedule
from nanoflow.scheduler.deal import Dealer
from nanoflow.scheduler.loop import SchedulerLoop
from nanoflow.scheduler.pages import PageAllocator
from nanoflow.scheduler.policy import Policy
from nanoflow.scheduler.slots import Slots
from nanoflow.scheduler.state import SchedulerState
from nanoflow.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded model and the scheduler that feeds it."""

    limits: EngineLimits
    device: str  # what the backend says of itself
    vocab_size: int
    model: ModelConfig
    config: Mapping[str, Any]  # as in config.json
    generation_config: Mapping[str, Any]  # as in generation_config.json
    tokenizer: Tokenizer | None
    loop: SchedulerLoop
    state: SchedulerState  # the loop's: for its thread, or when it is closed


def start_runtime(args: EngineArgs) -> Runtime:
    """Raises what class LLM says; whatever can be checked is checked before weights are read."""
    begin = perf_counter()
    checkpoint = open_checkpoint(
        args.model, args.load_format, revision=args.revision, seed=args.seed
    )
    backend = make_backend(args)
    schedule = find_schedule(args.schedule, backend.width)
    tokenizer = None if args.skip_tokenizer_init else _open_tokenizer(args, checkpoint)
    spec = _core.ModelSpec(**checkpoint.model.spec_arguments(checkpoint.resolve_dtype(args.dtype)))
    free_bytes = backend.free_memory
    weights = _core.Weights(spec, backend)
    limits = derive_limits(
        args,
        model_max_len=checkpoint.model.max_position_embeddings,
        kv_bytes_per_token=spec.kv_bytes_per_token,
        free_bytes=free_bytes,
        weight_bytes=weights.bytes,
    )
    _warn(args, limits, checkpoint.model.max_position_embeddings)
    opened = perf_counter()
    checkpoint.load_weights(weights)
    loaded = perf_counter()
    engine = _core.Engine(_engine_config(limits, args.enforce_eager), weights, schedule)
    state = _scheduler_state(limits, schedule.cuts(), args)
    steps_in_flight = 2 if args.async_scheduling else 1
    loop = SchedulerLoop(engine, _core.Batch, state, steps_in_flight=steps_in_flight)
    logger.info(
        "%s on %s: opened in %.2f s, %d bytes of weights loaded in %.2f s, engine with %d pages of "
        "%d tokens made in %.2f s",
        args.model,
        backend.description,
        opened - begin,
        weights.bytes,
        loaded - opened,
        limits.num_pages,
        limits.page_size,
        perf_counter() - loaded,
    )
    return Runtime(
        limits=limits,
        device=backend.description,
        vocab_size=checkpoint.model.vocab_size,
        model=checkpoint.model,
        config=checkpoint.config,
        generation_config=checkpoint.generation_config,
        tokenizer=tokenizer,
        loop=loop,
        state=state,
    )


def make_backend(args: EngineArgs) -> _core.Backend:
    """The device an LLM with these arguments runs on. Raises ValueError on an ISA it lacks."""
    if args.is_cuda:
        return _core.Backend(args.device)
    if args.cpu_isa not in ("auto", *_core.cpu_isas()):
        raise ValueError(
            f"cpu_isa={args.cpu_isa!r} does not run here; this CPU has "
            + ", ".join(_core.cpu_isas())
        )
    return _core.Backend("cpu", threads=cpu_threads(args), isa=args.cpu_isa)


def _warn(args: EngineArgs, limits: EngineLimits, model_max_len: int) -> None:
    """Says what the arguments do not come to, once and before it matters."""
    if args.max_model_len is None and limits.max_model_len < model_max_len:
        logger.warning(
            "requests may have %d tokens, not the model's %d: the KV cache holds no more; raise "
            "kv_cache_memory_bytes for longer ones",
            limits.max_model_len,
            model_max_len,
        )
    if not args.is_cuda and args.gpu_memory_utilization != DEFAULT_GPU_MEMORY_UTILIZATION:
        logger.warning(
            "gpu_memory_utilization=%s has no effect on the CPU: kv_cache_memory_bytes sizes the "
            "KV cache there",
            args.gpu_memory_utilization,
        )


def _open_tokenizer(args: EngineArgs, checkpoint: Checkpoint) -> Tokenizer:
    if args.tokenizer is None:
        return Tokenizer.from_source(checkpoint.tokenizer_source)
    path = Path(args.tokenizer).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"tokenizer={str(args.tokenizer)!r} is no folder")
    return Tokenizer.from_dir(path)


def _engine_config(limits: EngineLimits, enforce_eager: bool) -> _core.EngineConfig:
    return _core.EngineConfig(
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        page_size=limits.page_size,
        num_pages=limits.num_pages,
        enforce_eager=enforce_eager,
    )


def _scheduler_state(limits: EngineLimits, cuts: list[float], args: EngineArgs) -> SchedulerState:
    return SchedulerState(
        Policy(Dealer(cuts, limits.max_num_seqs), limits.max_num_batched_tokens),
        Slots(limits.max_num_seqs, limits.max_model_len, limits.page_size),
        PageAllocator(limits.num_pages),
        shares_prefixes=args.enable_prefix_caching is not False,
    )
