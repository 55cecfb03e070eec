"""Weights and engine in the memory that there is."""

from __future__ import annotations

from dataclasses import replace

from nanoflow import _core
from nanoflow.config import EngineArgs, EngineLimits
from nanoflow.errors import EngineError
from nanoflow.limits import check_free, derive_limits
from nanoflow.memory import GRAPH_BYTES, MemoryUse
from nanoflow.offload.setup import num_host_slots
from nanoflow.scheduler.policy import SCORED_ROWS


class Sizer:
    """Makes what takes memory, in the order in which it is measured: weights, then workspace and
    lanes, then the KV cache of what is left.

    Ranks on GPUs are alike, so that the first is measured, with the least memory that is free on
    any of them. Ranks on a CPU share its memory: there, sizes are those of all ranks together."""

    def __init__(
        self,
        args: EngineArgs,
        backends: list[_core.Backend],
        spec: _core.ModelSpec,
        model_max_len: int,
    ) -> None:
        self._args, self._backends, self._spec = args, backends, spec
        self._backend = backend = backends[0]
        self._model_max_len = model_max_len
        self._free = min(one.free_memory for one in backends)
        self._first_free = backend.free_memory
        total = backend.total_memory
        is_cuda = backend.device != "cpu"
        self._sharers = 1 if is_cuda else len(backends)  # ranks of one memory
        self._memory = MemoryUse(
            device=backend.device,
            total=total,
            in_use=total - self._free,
            weights=0,
            workspace=0,
            graphs=GRAPH_BYTES if is_cuda else 0,
        )

    def make_weights(self, schedule: _core.Schedule) -> list[_core.Weights]:
        """Weights of each rank, still to be filled.

        Raises ValueError on arguments that cannot work with them.
        """
        try:
            weights = [_core.Weights(self._spec, one, schedule.gathers) for one in self._backends]
        except _core.OutOfMemoryError as error:
            raise EngineError(
                f"{error}; the weights of {self._args.model} need a device with more memory free"
                f"\n{self._memory.table()}"
            ) from error
        self._spec = weights[0].spec  # of a rank's part
        self._memory = replace(self._memory, weights=weights[0].bytes * self._sharers)
        self._limits = self._derive()
        return weights

    def make_engine(
        self, weights: list[_core.Weights], schedule: _core.Schedule
    ) -> tuple[_core.Engine, EngineLimits, MemoryUse]:
        """The engine of these weights, its limits, and what took memory.

        Raises ValueError naming the argument to change where the memory is not enough.
        """
        limits = self._limits
        is_cuda = self._memory.kind == "cuda"
        config = _core.EngineConfig(
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_seqs=limits.max_num_seqs,
            max_scored_rows=SCORED_ROWS,
            max_model_len=limits.max_model_len,
            page_size=limits.page_size,
            num_pages=0 if is_cuda else limits.num_pages,
            host_slots=num_host_slots(self._args, self._spec),
            enforce_eager=self._args.enforce_eager,
        )
        try:
            engine = _core.Engine(config, weights, schedule, self._choose_pages)
        except _core.OutOfMemoryError as error:
            raise EngineError(
                f"{error}; lower max_num_batched_tokens ({limits.max_num_batched_tokens}) or "
                f"kv_cache_memory_bytes\n{self._memory.table()}"
            ) from error
        if not is_cuda:
            workspace = engine.workspace_bytes * self._sharers
            self._memory = replace(self._memory, workspace=workspace)
        num_pages = engine.config.num_pages
        page_bytes = self._kv_bytes_per_token * limits.page_size
        memory = replace(
            self._memory,
            kv_cache=num_pages * page_bytes,
            num_pages=num_pages,
            page_size=limits.page_size,
        )
        return engine, self._limits, memory

    def _choose_pages(self) -> int:
        """Called by the engine once all but its KV cache has its memory."""
        taken = self._first_free - self._backend.free_memory
        workspace = max(0, taken - self._memory.weights)
        self._memory = replace(self._memory, workspace=workspace)
        self._limits = self._derive()
        return self._limits.num_pages

    @property
    def _kv_bytes_per_token(self) -> int:
        return self._spec.kv_bytes_per_token * self._sharers

    def _derive(self) -> EngineLimits:
        per_token = self._kv_bytes_per_token
        limits = derive_limits(
            self._args,
            self._memory,
            model_max_len=self._model_max_len,
            kv_bytes_per_token=per_token,
        )
        if self._memory.kind == "cuda":  # a CPU's memory is taken when it is first written
            check_free(self._args, self._memory, limits, per_token * limits.page_size)
        return limits
