"""What LLM and AsyncLLM have in common."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoflow.config import make_args
from nanoflow.energy import open_meter
from nanoflow.memory import MemoryUse
from nanoflow.metrics import Metric, StatusLine, make_metrics
from nanoflow.models.config import ModelConfig
from nanoflow.processor import Processor
from nanoflow.runtime import start_runtime
from nanoflow.sampling_params import SamplingParams
from nanoflow.scheduler.stats import StepListener


class Front:
    """A running engine, and what may be asked of it at any time, by any thread."""

    def __init__(self, model: str | Path, arguments: Mapping[str, Any]) -> None:
        self.args = make_args({"model": model, **arguments})
        self._runtime = start_runtime(self.args)
        self.limits = self._runtime.limits
        self.start_seconds = self._runtime.start_seconds
        self._processor = Processor(self._runtime, self.args.seed)
        self._meter = open_meter(self._runtime.memory.device, self.args.tensor_parallel_size)
        self._status = StatusLine(
            self._runtime.state.stats, is_on=not self.args.disable_log_stats, meter=self._meter
        )
        self._finalizer = weakref.finalize(self, self._runtime.loop.close)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json says, else the defaults; a new object."""
        return self._processor.default_params()

    def get_metrics(self) -> list[Metric]:
        """Of this moment: Counter, Gauge and Histogram of `nanoflow.metrics`, with vLLM's names."""
        return make_metrics(self._runtime.state.stats(), str(self.args.model), self._meter)

    @property
    def step_listener(self) -> StepListener | None:
        """Called in the scheduler's thread with a StepStats after every step; must not block."""
        return self._runtime.loop.step_listener

    @step_listener.setter
    def step_listener(self, listener: StepListener | None) -> None:
        self._runtime.loop.step_listener = listener

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._runtime.vocab_size

    @property
    def model_config(self) -> ModelConfig:
        """The model's dimensions and traits."""
        return self._runtime.model

    @property
    def device_description(self) -> str:
        """The device and how it is used, in words."""
        return self._runtime.device

    @property
    def memory(self) -> MemoryUse:
        """Where the device's memory is, without what sleeps."""
        return self._runtime.current_memory()
