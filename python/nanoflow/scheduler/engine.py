"""What the scheduler needs of an engine: `_core.Engine`, or a fake of it in tests and benches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray


class StepLogprobs(Protocol):
    """Arrays of the op Logprobs in csrc/kernels/ops.h. Rows that did not ask hold anything."""

    @property
    def top(self) -> NDArray[np.int32]:
        """[S, 20] the likeliest tokens."""

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """[S, 21] of the sampled token, then of `top`."""

    @property
    def ranks(self) -> NDArray[np.int32]:
        """[S] of the sampled token, from 1."""


class StepResult(Protocol):
    @property
    def tokens(self) -> NDArray[np.int32]:
        """[S] sampled tokens; negative where a row's logits were not finite."""

    @property
    def logprobs(self) -> StepLogprobs | None:
        """When some row of the batch wanted them."""


class StepHandle(Protocol):
    @property
    def step(self) -> int:
        """Number of the step, from 1."""

    def is_done(self) -> bool:
        """Whether wait() would return at once."""

    def wait(self) -> StepResult:
        """Blocks until the step has completed; raises what made it fail."""


class CopyHandle(Protocol):
    def wait(self) -> float:
        """Blocks until the pages are copied; the seconds that it took. Raises on failure."""


# Makes a batch from arrays named as in csrc/pipeline/batch.h, which it copies.
BatchFactory: TypeAlias = Callable[..., Any]


class Engine(Protocol):
    def submit(self, batch: Any) -> StepHandle:
        """Queues a step and returns at once; at most two may be on their way."""

    def set_schedule(self, schedule: Any) -> None:
        """For the steps queued from now on."""

    def store_pages(self, pages: NDArray[np.int32], slots: NDArray[np.int32]) -> CopyHandle:
        """Copies pages, as the steps submitted so far leave them, into slots of the host pool."""

    def load_pages(self, pages: NDArray[np.int32], slots: NDArray[np.int32]) -> CopyHandle:
        """Copies slots of the host pool into pages at once; later steps begin behind it."""

    def sleep(self, discard_weights: bool) -> None:
        """Gives back all memory but that of weights which the host keeps. No step is in flight."""

    def wake_weights(self) -> None:
        """Brings kept weights back; discarded ones are to be filled again."""

    def wake_cache(self) -> None:
        """Then, with an empty KV cache."""

    def restart(self) -> None:
        """After a step has failed and all have been waited for: lets steps be submitted again.

        What pages and slots held is lost. Raises when the device cannot be used any more.
        """
