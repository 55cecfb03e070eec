"""Runs a workload at once through an LLM and says how fast it went, in vLLM's words and more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from nanoflow.bench.datasets import Request
from nanoflow.bench.steady import SteadyState, Step, steady_state
from nanoflow.outputs import RequestOutput
from nanoflow.sampling_params import SamplingParams


class Generator(Protocol):
    """What is measured: `nanoflow.LLM`, an AsyncBatch, or a fake in tests."""

    step_listener: Any

    def generate(
        self, prompts: Any, sampling_params: Any, *, use_tqdm: bool, order: str = "fcfs"
    ) -> list[RequestOutput]: ...


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run: all requests given at once, until the last has its text."""

    begin: float  # seconds of time.perf_counter
    seconds: float
    num_requests: int
    input_tokens: int
    output_tokens: int
    steps: int
    steady: SteadyState | None

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


def sampling_params(
    requests: Sequence[Request], *, temperature: float, detokenize: bool, seed: int, n: int = 1
) -> list[SamplingParams]:
    """For `n` outputs of each request's length, whatever is sampled."""
    return [
        SamplingParams(
            n=n,
            temperature=temperature,
            seed=seed + index,
            max_tokens=request.output_len,
            ignore_eos=True,
            detokenize=detokenize,
        )
        for index, request in enumerate(requests)
    ]


def measure(
    llm: Generator,
    requests: Sequence[Request],
    *,
    temperature: float,
    detokenize: bool,
    seed: int,
    n: int = 1,
    use_tqdm: bool = True,
    order: str = "fcfs",
) -> Measurement:
    """Raises RuntimeError when a request did not generate all of its tokens."""
    prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
    params = sampling_params(
        requests, temperature=temperature, detokenize=detokenize, seed=seed, n=n
    )
    steps: list[Step] = []
    llm.step_listener = steps.append
    try:
        begin = perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=use_tqdm, order=order)
        seconds = perf_counter() - begin
    finally:
        llm.step_listener = None
    for request, output in zip(requests, outputs, strict=True):
        generated = sum(len(one.token_ids) for one in output.outputs)
        if generated != n * request.output_len:
            raise RuntimeError(
                f"request {output.request_id} generated {generated} tokens instead of "
                f"{n * request.output_len}"
            )
    input_tokens = sum(len(request.prompt_token_ids) for request in requests)
    output_tokens = n * sum(request.output_len for request in requests)
    count = len(requests)
    return Measurement(
        begin=begin,
        seconds=seconds,
        num_requests=count,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        steps=len(steps),
        steady=steady_state(steps, input_tokens / count, output_tokens / count),
    )


def lines(run: Measurement) -> list[str]:
    """The three lines of `vllm bench throughput`, as scripts parse them, then ours."""
    rate = 1 / run.seconds
    text = [
        f"Throughput: {run.num_requests * rate:.2f} requests/s, "
        f"{run.total_tokens * rate:.2f} total tokens/s, "
        f"{run.output_tokens * rate:.2f} output tokens/s",
        f"Total num prompt tokens:  {run.input_tokens}",
        f"Total num output tokens:  {run.output_tokens}",
        f"Mean lengths: {run.input_tokens / run.num_requests:.1f} in, "
        f"{run.output_tokens / run.num_requests:.1f} out",
        f"Whole run: {run.total_tokens * rate:.2f} total tokens/s in {run.seconds:.2f} s, "
        f"{run.steps} steps",
    ]
    if run.steady is None:
        text.append("Steady state: none, all requests were running before the first ended")
    else:
        text.append(steady_line(run.steady))
    return text


def steady_line(state: SteadyState) -> str:
    return (
        f"Steady state: {state.tokens_per_second:.2f} total tokens/s in {state.seconds:.2f} s, "
        f"{state.steps} steps of {state.step_ms:.2f} ms (counted {state.counted_per_second:.2f}, "
        f"from {state.output_per_second:.2f} output tokens/s {state.from_output_per_second:.2f}; "
        f"{state.prompt_tokens / state.output_tokens:.3f} prompt tokens per output token, "
        f"{state.mean_input / state.mean_output:.3f} in the long run)"
    )


def to_json(run: Measurement) -> dict[str, Any]:
    """The fields of `vllm bench throughput` and of SGLang's offline benchmark, then ours."""
    rate = 1 / run.seconds
    return {
        "elapsed_time": run.seconds,
        "num_requests": run.num_requests,
        "total_num_tokens": run.total_tokens,
        "requests_per_second": run.num_requests * rate,
        "tokens_per_second": run.total_tokens * rate,
        "total_input_tokens": run.input_tokens,
        "total_output_tokens": run.output_tokens,
        "request_throughput": run.num_requests * rate,
        "input_throughput": run.input_tokens * rate,
        "output_throughput": run.output_tokens * rate,
        "total_throughput": run.total_tokens * rate,
        "total_token_throughput": run.total_tokens * rate,
        "mean_input_len": run.input_tokens / run.num_requests,
        "mean_output_len": run.output_tokens / run.num_requests,
        "num_steps": run.steps,
        "measured": "whole run",
        "total_tok_s": run.total_tokens * rate,
        "output_tok_s": run.output_tokens * rate,
        "steady_total_tok_s": run.steady and run.steady.tokens_per_second,
        "step_ms": run.seconds / run.steps * 1e3 if run.steps else None,
        "steady_state": run.steady and run.steady.to_json(),
    }
