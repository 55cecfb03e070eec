"""What constrained and penalised requests cost the pipeline: SmolLM2-135M-Instruct.

Random tokens in, greedy tokens out, all requests of one length, so that every run has as much to
compute. A share of them carries an option; what its runs take is compared with those of a run in
which nobody does, and so is how long the plain requests beside them take. Each round runs all of
them once.

    python bench/constrained.py --output-json bench/results/cpu/constrained.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from nanoflow import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from nanoflow.bench import environment
from nanoflow.bench.datasets import Lengths, Request, random_requests
from nanoflow.bench.default_model import default_model

# Grammars that no output of a run completes.
PERSONS = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.2},
    "logit_bias": {"logit_bias": dict.fromkeys(range(100, 400), 2.0)},
    "allowed_token_ids": {"allowed_token_ids": list(range(100, 20_000))},
    "bad_words": {"bad_words": ["in the end", "as a matter of fact"]},
    "regex": {"structured_outputs": StructuredOutputsParams(regex="([a-z]+ )*")},
    "json": {"structured_outputs": StructuredOutputsParams(json=PERSONS)},
}
SHARES = (0.25, 1.0)


@dataclass(frozen=True)
class Run:
    """One run; times in seconds."""

    seconds: float
    cpu_seconds: float  # of all threads: what other work on the machine changes little
    plain_seconds: float | None  # until the last of the requests without the option had ended
    steps: int


@dataclass(frozen=True)
class Row:
    """Medians of the runs of a kind and share."""

    kind: str
    share: float  # of the requests, that carry the option
    total_token_throughput: float
    seconds: float
    seconds_of_unconstrained: float  # over those of the run without any
    cpu_seconds: float
    cpu_seconds_of_unconstrained: float
    plain_seconds_of_unconstrained: float | None
    steps: int


def params_of(request: Request, options: Mapping[str, Any]) -> SamplingParams:
    """No end of sequence is sampled, so that grammars hold to the last token."""
    length = request.output_len
    params = SamplingParams(temperature=0, max_tokens=length, min_tokens=length, detokenize=False)
    return replace(params, **options)


def measure(llm: LLM, requests: list[Request], kind: str, share: float) -> Run:
    """Raises RuntimeError when not all tokens were generated."""
    count = round(share * len(requests))
    constrained = {round(i * len(requests) / count) for i in range(count)}
    params = [
        params_of(request, KINDS[kind] if i in constrained else {})
        for i, request in enumerate(requests)
    ]
    steps = 0

    def count_step(_: object) -> None:
        nonlocal steps
        steps += 1

    llm.reset_prefix_cache()
    llm.step_listener = count_step
    prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
    begin, cpu_begin = perf_counter(), process_time()
    outputs: list[RequestOutput] = llm.generate(prompts, params, use_tqdm=False)
    seconds, cpu_seconds = perf_counter() - begin, process_time() - cpu_begin
    llm.step_listener = None
    for request, output in zip(requests, outputs, strict=True):
        if len(output.outputs[0].token_ids) != request.output_len:
            raise RuntimeError(f"{kind}: {output.error or output.outputs[0].finish_reason}")
    ends = [o.metrics.finished_time for i, o in enumerate(outputs) if i not in constrained]
    return Run(seconds, cpu_seconds, max(ends) - begin if ends else None, steps)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-json", type=Path)
    return parser.parse_args()


def summarise(runs: Mapping[tuple[str, float], list[Run]], tokens: int) -> list[Row]:
    def medians(own: list[Run]) -> tuple[float, float]:
        return (
            statistics.median(run.seconds for run in own),
            statistics.median(run.cpu_seconds for run in own),
        )

    plain, plain_cpu = medians(runs["none", 0.0])
    rows = []
    for case, own in runs.items():
        seconds, cpu_seconds = medians(own)
        plain_seconds = [run.plain_seconds for run in own if run.plain_seconds is not None]
        rows.append(
            Row(
                kind=case[0],
                share=case[1],
                total_token_throughput=tokens / seconds,
                seconds=seconds,
                seconds_of_unconstrained=seconds / plain,
                cpu_seconds=cpu_seconds,
                cpu_seconds_of_unconstrained=cpu_seconds / plain_cpu,
                plain_seconds_of_unconstrained=(
                    statistics.median(plain_seconds) / plain if plain_seconds else None
                ),
                steps=own[0].steps,
            )
        )
    return rows


def main() -> None:
    options = parse_arguments()
    llm = LLM(default_model(), dtype="bfloat16", device="cpu", cpu_threads=options.threads)
    rng = np.random.default_rng(options.seed)
    special_ids = llm.get_tokenizer().special_ids
    lengths = [Lengths(options.input_len, options.output_len)] * options.num_prompts
    requests = random_requests(lengths, llm.vocab_size, special_ids, rng)
    cases = [("none", 0.0), *((kind, share) for kind in KINDS for share in SHARES)]
    short = [replace(request, output_len=4) for request in requests[:4]]
    for kind, share in cases:
        measure(llm, short, kind, share)
    runs: dict[tuple[str, float], list[Run]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case, own in runs.items():
            own.append(measure(llm, requests, *case))
    rows = summarise(runs, options.num_prompts * (options.input_len + options.output_len))
    for row in rows:
        beside = row.plain_seconds_of_unconstrained
        print(
            f"{row.kind:>18} {row.share:5.0%}: {row.total_token_throughput:6.0f} total tok/s, "
            f"{row.seconds_of_unconstrained:.2f} times the seconds of none, "
            f"{row.cpu_seconds_of_unconstrained:.2f} times the CPU seconds, {row.steps} steps"
            + (f", plain ones {beside:.2f}" if beside is not None else "")
        )
    if options.output_json is None:
        return
    result = {
        "benchmark": "constrained",
        "command": environment.command_line(),
        "commit": environment.commit(),
        "versions": environment.versions(("nanoflow", "numpy", "tokenizers", "llguidance")),
        "device": environment.cpu_model(),
        "threads": options.threads,
        "load_average": os.getloadavg()[0],
        "model_id": "SmolLM2-135M-Instruct",
        "num_requests": options.num_prompts,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "seed": options.seed,
        "warm_up": "4 requests of 4 output tokens of each case, not counted",
        "rounds": options.rounds,
        "results": [asdict(row) for row in rows],
    }
    options.output_json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
