"""Conversations of several rounds with an AsyncLLM, with the lengths of LMSYS-Chat-1M.

102 tokens are asked and 222 answered, on average, as the NanoFlow paper has them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import perf_counter, process_time

import numpy as np

from nanoflow import AsyncLLM, SamplingParams
from nanoflow.sampling_params import RequestOutputKind

MEAN_ASKED, MEAN_ANSWERED = 102, 222
SIGMA = 1.0  # of the logarithms: the standard deviations are as large as the means, as there


@dataclass(frozen=True)
class Round:
    asked: list[int]  # token ids
    answered: int  # tokens
    think: float  # seconds before it


def conversations(
    count: int, rounds: int, *, scale: float, think: float, vocab_size: int, seed: int = 0
) -> list[list[Round]]:
    """Rounds of each, random ones; `think`: seconds, mean."""
    rng = np.random.default_rng(seed)

    def length(mean_length: float) -> int:
        drawn = rng.lognormal(np.log(mean_length * scale) - SIGMA**2 / 2, SIGMA)
        return int(np.clip(drawn, 2, 4 * mean_length * scale))

    return [
        [
            Round(
                rng.integers(2, vocab_size, length(MEAN_ASKED)).tolist(),
                length(MEAN_ANSWERED),
                float(rng.exponential(think)),
            )
            for _ in range(rounds)
        ]
        for _ in range(count)
    ]


async def answer(
    llm: AsyncLLM, name: str, prompt: list[int], tokens: int
) -> tuple[list[int], float]:
    """The tokens of an answer, and the seconds until the first."""
    params = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        min_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    final = await anext(llm.generate({"prompt_token_ids": prompt}, params, name))
    output = final.outputs[0].token_ids
    assert len(output) == tokens, f"{len(output)} of {tokens} tokens"
    assert final.metrics is not None
    return output, final.metrics.first_token_time - final.metrics.arrival_time


async def converse(
    llm: AsyncLLM, name: str, rounds: list[Round], first_tokens: list[float]
) -> list[int]:
    """All that is said; appends the waits for the first token of all rounds but the first."""
    said: list[int] = []
    for turn, one in enumerate(rounds):
        await asyncio.sleep(one.think)
        said += one.asked
        tokens, first = await answer(llm, f"{name}-{turn}", said, one.answered)
        said = said + tokens
        if turn > 0:
            first_tokens.append(first)
    return said


@dataclass(frozen=True)
class Talk:
    """Conversations that have been held."""

    said: list[list[int]]
    seconds: float
    cpu_seconds: float
    first_tokens: list[float]
    device_idle: float
    prompt_tokens: int
    output_tokens: int

    @property
    def total_tokens_per_second(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.seconds


def hold(llm: AsyncLLM, name: str, talk: list[list[Round]]) -> Talk:
    first_tokens: list[float] = []

    async def all_of_them() -> list[list[int]]:
        tasks = (converse(llm, f"{name}-{n}", one, first_tokens) for n, one in enumerate(talk))
        return await asyncio.gather(*tasks)

    before = metrics_of(llm)
    begin, cpu_begin = perf_counter(), process_time()
    said = asyncio.run(all_of_them())
    seconds, cpu_seconds = perf_counter() - begin, process_time() - cpu_begin
    after = metrics_of(llm)
    idle, open_ = (
        after[key] - before[key] for key in ("engine_idle_seconds", "engine_open_seconds")
    )
    prompts = [
        sum(len(earlier.asked) + earlier.answered for earlier in rounds[:turn]) + len(one.asked)
        for rounds in talk
        for turn, one in enumerate(rounds)
    ]
    output_tokens = sum(one.answered for rounds in talk for one in rounds)
    return Talk(said, seconds, cpu_seconds, first_tokens, idle / open_, sum(prompts), output_tokens)


def metrics_of(llm: AsyncLLM) -> dict[str, float]:
    """Gauges and counters by their names and labels."""
    found = {}
    for metric in llm.get_metrics():
        own = [v for name, v in metric.labels.items() if name not in ("model_name", "engine")]
        if hasattr(metric, "value"):
            found[":".join([metric.name.removeprefix("nanoflow:"), *own])] = metric.value
    return found
