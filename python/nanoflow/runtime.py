"""From arguments to a running engine: open the model, size the cache, load, start the scheduler."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

from nanoflow import _core
from nanoflow.config import (
    AUTO,
    DEFAULT_GPU_MEMORY_UTILIZATION,
    EngineArgs,
    EngineLimits,
    parse_length,
)
from nanoflow.devices import make_backends
from nanoflow.loading import Checkpoint, RankStores, open_checkpoint
from nanoflow.memory import MemoryUse
from nanoflow.models.config import ModelConfig
from nanoflow.offload.offload import Offload
from nanoflow.offload.setup import make_offload
from nanoflow.schedule import AUTO as AUTO_SCHEDULE
from nanoflow.schedule import find_schedule
from nanoflow.scheduler.choose import Option
from nanoflow.scheduler.deal import Dealer
from nanoflow.scheduler.loop import SchedulerLoop
from nanoflow.scheduler.pages import PageAllocator
from nanoflow.scheduler.policy import Policy
from nanoflow.scheduler.sleep import check_level, check_tags
from nanoflow.scheduler.slots import Slots
from nanoflow.scheduler.state import SchedulerState
from nanoflow.scheduler.waiting import WaitingQueue
from nanoflow.sizer import Sizer
from nanoflow.tokenizer import Tokenizer
from nanoflow.tune.auto import choose_schedules

logger = logging.getLogger(__name__)

PHASES = ("open", "weights", "engine")  # of the start: model and device; loading; all buffers


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded model and the scheduler that feeds it."""

    limits: EngineLimits
    memory: MemoryUse
    start_seconds: Mapping[str, float]  # of PHASES
    device: str  # what the backend says of itself
    width: int  # of it: SMs, or threads of a CPU
    vocab_size: int
    model: ModelConfig
    config: Mapping[str, Any]  # as in config.json
    generation_config: Mapping[str, Any]  # as in generation_config.json
    tokenizer: Tokenizer | None
    auto: _core.Schedule | None  # what schedule="auto" started with
    loop: SchedulerLoop
    state: SchedulerState  # the loop's: for its thread, or when it is closed; stats() always

    def current_memory(self) -> MemoryUse:
        """`memory`, without what sleeps elsewhere: level 1 leaves weights where a host has them."""
        memory, loop = self.memory, self.loop
        if "kv_cache" in loop.asleep:
            memory = replace(memory, workspace=0, graphs=0, kv_cache=0, num_pages=0)
        if "weights" in loop.asleep and (memory.kind != "cpu" or loop.sleep_level == 2):
            memory = replace(memory, weights=0)
        return memory

    def sleep(self, level: int) -> None:
        """As LLM.sleep says."""
        check_level(level)
        self.loop.sleep(level)

    def wake_up(self, tags: Collection[str] | None) -> None:
        """As LLM.wake_up says."""
        self.loop.wake_up(check_tags(tags))

    def use_schedule(self, schedule: str | Path | _core.Schedule) -> None:
        """As LLM.set_schedule says."""
        start = self.auto if schedule == AUTO_SCHEDULE else None
        found = find_schedule(schedule, self.width) if start is None else start
        dealer = Dealer(found.cuts(), self.limits.max_num_seqs)
        self.loop.use_schedule(Option(found.id, found, dealer), is_choice=start is not None)


def start_runtime(args: EngineArgs) -> Runtime:
    """Raises what class LLM says; whatever can be checked is checked before weights are read."""
    times = [perf_counter()]
    checkpoint = open_checkpoint(
        args.model, args.load_format, revision=args.revision, seed=args.seed
    )
    spec = make_spec(args, checkpoint)
    backends = make_backends(args, spec)
    backend = backends[0]
    choice = choose_schedules(args, backend, spec)
    schedule = choice.schedules[0]
    tokenizer = None if args.skip_tokenizer_init else _open_tokenizer(args, checkpoint)
    times.append(perf_counter())
    sizer = Sizer(args, backends, spec, checkpoint.model.max_position_embeddings)
    weights = sizer.make_weights(schedule)
    checkpoint.load_weights(RankStores(weights))
    times.append(perf_counter())
    engine, limits, memory = sizer.make_engine(weights, schedule)
    _warn(args, limits, checkpoint.model.max_position_embeddings, memory.kind)
    offload = make_offload(args, engine, checkpoint, memory)
    state = _scheduler_state(limits, schedule.cuts(), args, offload)
    steps_in_flight = 2 if args.async_scheduling else 1
    loop = SchedulerLoop(
        engine,
        _core.Batch,
        state,
        steps_in_flight=steps_in_flight,
        chooser=choice.chooser(limits.max_num_seqs),
        refill=lambda: checkpoint.load_weights(RankStores(weights)),
    )
    times.append(perf_counter())
    phases = dict(zip(PHASES, (b - a for a, b in pairwise(times)), strict=True))
    logger.info("%s\n%s", backend.description, memory.table())
    logger.info(
        "%s started: %s", args.model, ", ".join(f"{n} {s:.2f} s" for n, s in phases.items())
    )
    return Runtime(
        limits=limits,
        memory=memory,
        start_seconds=phases,
        device=backend.description,
        width=backend.width,
        vocab_size=checkpoint.model.vocab_size,
        model=checkpoint.model,
        config=checkpoint.config,
        generation_config=checkpoint.generation_config,
        tokenizer=tokenizer,
        auto=schedule if args.schedule == AUTO_SCHEDULE else None,
        loop=loop,
        state=state,
    )


def make_spec(args: EngineArgs, checkpoint: Checkpoint) -> _core.ModelSpec:
    """The model that an LLM with these arguments runs."""
    dtype = checkpoint.resolve_dtype(args.dtype)
    length = parse_length("max_model_len", args.max_model_len)
    return _core.ModelSpec(
        **checkpoint.model.spec_arguments(dtype, None if length == AUTO else length)
    )


def _warn(args: EngineArgs, limits: EngineLimits, model_max_len: int, kind: str) -> None:
    """Says what the arguments do not come to."""
    if args.max_model_len is None and limits.max_model_len < model_max_len:
        flag = "gpu_memory_utilization" if kind == "cuda" else "kv_cache_memory_bytes"
        logger.warning(
            "requests may have %d tokens, not the model's %d: the KV cache holds no more; raise "
            "%s for longer ones",
            limits.max_model_len,
            model_max_len,
            flag,
        )
    if kind == "cpu" and args.gpu_memory_utilization != DEFAULT_GPU_MEMORY_UTILIZATION:
        logger.warning(
            "gpu_memory_utilization=%s has no effect on the CPU: kv_cache_memory_bytes sizes the "
            "KV cache there",
            args.gpu_memory_utilization,
        )
    if kind == "cuda" and (args.cpu_threads or args.cpu_isa != "auto"):
        logger.warning("cpu_threads and cpu_isa have no effect on a GPU")


def _open_tokenizer(args: EngineArgs, checkpoint: Checkpoint) -> Tokenizer:
    if args.tokenizer is None:
        return Tokenizer.from_source(checkpoint.tokenizer_source)
    path = Path(args.tokenizer).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"tokenizer={str(args.tokenizer)!r} is no folder")
    return Tokenizer.from_dir(path)


def _scheduler_state(
    limits: EngineLimits, cuts: list[float], args: EngineArgs, offload: Offload | None
) -> SchedulerState:
    return SchedulerState(
        Policy(Dealer(cuts, limits.max_num_seqs), limits.max_num_batched_tokens),
        Slots(limits.max_num_seqs, limits.max_model_len, limits.page_size),
        PageAllocator(limits.num_pages),
        shares_prefixes=args.enable_prefix_caching is not False,
        offload=offload,
        waiting=WaitingQueue(args.max_num_queued_reqs, args.max_num_queued_tokens),
    )
