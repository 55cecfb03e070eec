"""AsyncLLM as the throughput command measures it: a batch of it, with a task for each request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from tqdm.asyncio import tqdm  # type: ignore[import-untyped]

from nanoflow.async_llm import AsyncLLM
from nanoflow.outputs import RequestOutput
from nanoflow.progress import logs_beside_bar
from nanoflow.prompts import PromptLike
from nanoflow.sampling_params import SamplingParams
from nanoflow.scheduler.stats import StepListener
from nanoflow.tokenizer import Tokenizer


class AsyncBatch:
    """Has of LLM's interface what whole runs need; requests reach the engine while it runs."""

    def __init__(self, **arguments: Any) -> None:
        """Takes and raises what LLM does."""
        self._llm = llm = AsyncLLM(**arguments)
        self.args, self.limits, self.memory = llm.args, llm.limits, llm.memory
        self.vocab_size, self.device_description = llm.vocab_size, llm.device_description
        self.get_metrics = llm.get_metrics

    def generate(
        self,
        prompts: Sequence[PromptLike],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
        order: str = "fcfs",
    ) -> list[RequestOutput]:
        """The last output of each request, whose task reads all that its stream tells before.

        Raises what AsyncLLM.generate does for any of them, and ValueError on another `order`.
        """
        if order != "fcfs":
            raise ValueError(f"order={order!r}, but AsyncLLM takes requests as they come")

        async def last_output(index: int) -> RequestOutput:
            prompt, params = prompts[index], sampling_params[index]
            async for output in self._llm.generate(prompt, params, f"batch-{index}"):
                last = output
            return last

        async def run() -> list[RequestOutput]:
            tasks = map(last_output, range(len(prompts)))
            found: list[RequestOutput] = await tqdm.gather(
                *tasks, desc="Processed prompts", disable=not use_tqdm
            )
            return found

        with logs_beside_bar(use_tqdm):
            return asyncio.run(run())

    @property
    def step_listener(self) -> StepListener | None:
        """As LLM's."""
        return self._llm.step_listener

    @step_listener.setter
    def step_listener(self, listener: StepListener | None) -> None:
        self._llm.step_listener = listener

    def get_tokenizer(self) -> Tokenizer:
        return asyncio.run(self._llm.get_tokenizer())

    def reset_prefix_cache(self) -> bool:
        return asyncio.run(self._llm.reset_prefix_cache())

    def __enter__(self) -> AsyncBatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self._llm.shutdown()
