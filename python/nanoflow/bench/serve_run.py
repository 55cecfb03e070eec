"""Requests that arrive in time at an AsyncLLM of this process, and what their clients see."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from nanoflow.async_llm import AsyncLLM
from nanoflow.bench.datasets import Request
from nanoflow.bench.serve_metrics import Served
from nanoflow.errors import RequestError
from nanoflow.sampling_params import RequestOutputKind, SamplingParams

RAMPS = ("linear", "exponential")


@dataclass(frozen=True, slots=True)
class Ramp:
    """Requests a second that grow from the first request to the last, as vLLM's flags say."""

    strategy: str  # of RAMPS
    start: float
    end: float

    def rates(self, count: int) -> NDArray[np.float64]:
        if self.strategy == "linear":
            return np.linspace(self.start, self.end, count)
        return np.geomspace(self.start, self.end, count)


def arrival_times(
    count: int, rate: float, burstiness: float, rng: np.random.Generator
) -> list[float]:
    """Seconds at which requests arrive, `rate` of them a second in the mean; all at 0 for infinity.

    Gaps are gamma-distributed with shape `burstiness`: 1 is a Poisson process, less comes in bursts
    and more evenly. As in vLLM they are scaled so that the last request comes at count / rate.
    Raises ValueError on a rate or burstiness that is not above 0.
    """
    if not rate > 0 or not burstiness > 0:
        raise ValueError(f"request rate {rate} and burstiness {burstiness} must be above 0")
    if math.isinf(rate):
        return [0.0] * count
    times = np.cumsum(rng.gamma(burstiness, 1 / (rate * burstiness), count))
    return (times * (count / rate / times[-1])).tolist()  # type: ignore[no-any-return]


def ramp_times(ramp: Ramp, count: int, burstiness: float, rng: np.random.Generator) -> list[float]:
    """The same while the rate grows from request to request; the end is not scaled."""
    rates = ramp.rates(count)
    gaps: NDArray[np.float64] = rng.gamma(burstiness, 1 / (rates * burstiness))
    return np.cumsum(gaps).tolist()  # type: ignore[no-any-return]


async def serve(
    llm: AsyncLLM,
    requests: Sequence[Request],
    arrivals: Sequence[float],
    *,
    params: SamplingParams,
    max_concurrency: int | None = None,
) -> tuple[list[Served], float]:
    """What each client saw, and the seconds until the last had its end.

    `params` but for the seed and the number of tokens, which are each request's own.
    With `max_concurrency`, requests wait their turn before they are sent, and their clocks start
    when they are. Otherwise they start at the arrival, whatever keeps this process busy then.
    Raises EngineError when the engine fails; a request that cannot be run fails alone.
    """
    gate = None if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    begin = perf_counter()

    async def client(index: int) -> Served:
        await asyncio.sleep(begin + arrivals[index] - perf_counter())
        async with gate or contextlib.nullcontext():
            start = arrivals[index] if gate is None else perf_counter() - begin
            one = Served(len(requests[index].prompt_token_ids), start)
            own = replace(
                params,
                seed=(params.seed or 0) + index,
                max_tokens=requests[index].output_len,
                output_kind=RequestOutputKind.DELTA,
            )
            prompt = {"prompt_token_ids": requests[index].prompt_token_ids}
            try:
                async for output in llm.generate(prompt, own, f"serve-{index}"):
                    completion = output.outputs[0]
                    if completion.token_ids:
                        one.news.append((perf_counter() - begin, len(completion.token_ids)))
                    one.text += completion.text
            except (ValueError, RequestError) as error:  # a full queue, say
                one.error = str(error)
            return one

    served = await asyncio.gather(*(client(index) for index in range(len(requests))))
    return list(served), perf_counter() - begin
