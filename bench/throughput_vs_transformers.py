"""Throughput of SmolLM2-135M-Instruct here and in `transformers`, alternating in one process.

64 requests of 128 random tokens in and 128 out, greedy, token ids in and out, all cores. Each round
runs every engine once, so that a change of the machine's speed meets all of them; the medians are
compared. Loading and one short warm-up of each engine are not counted.

    python bench/throughput_vs_transformers.py --output-json bench/results/cpu/transformers.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from nanoflow import LLM, SamplingParams
from nanoflow.bench import environment
from nanoflow.bench.datasets import Lengths, Request, random_requests
from nanoflow.bench.default_model import default_model

Run = Callable[[list[Request]], int]  # generates, and returns the number of output tokens


def nanoflow_run(llm: LLM) -> Run:
    def run(requests: list[Request]) -> int:
        prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
        params = [
            SamplingParams(
                temperature=0, max_tokens=request.output_len, ignore_eos=True, detokenize=False
            )
            for request in requests
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


def transformers_run(model: Path, dtype: torch.dtype) -> Run:
    network = AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=dtype
    ).eval()

    def run(requests: list[Request]) -> int:
        ids = torch.tensor([request.prompt_token_ids for request in requests])
        output_len = requests[0].output_len
        with torch.inference_mode():
            tokens = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=output_len,
                max_new_tokens=output_len,
            )
        return (tokens.shape[1] - ids.shape[1]) * len(requests)

    return run


def measure(run: Run, requests: list[Request]) -> float:
    """Seconds of one run; raises when it did not generate all tokens."""
    begin = perf_counter()
    output_tokens = run(requests)
    seconds = perf_counter() - begin
    expected = sum(request.output_len for request in requests)
    if output_tokens != expected:
        raise RuntimeError(f"{output_tokens} output tokens instead of {expected}")
    return seconds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    model = default_model()
    sequential, overlap = (
        LLM(model, dtype="bfloat16", schedule=schedule, cpu_threads=options.threads)
        for schedule in ("sequential", "overlap")
    )
    engines = {
        "nanoflow sequential, bfloat16": nanoflow_run(sequential),
        "nanoflow overlap, bfloat16": nanoflow_run(overlap),
        "transformers generate, bfloat16": transformers_run(model, torch.bfloat16),
        "transformers generate, float32": transformers_run(model, torch.float32),
    }
    rng = np.random.default_rng(options.seed)
    special_ids = sequential.get_tokenizer().special_ids

    def draw(output_len: int) -> list[Request]:
        lengths = [Lengths(options.input_len, output_len)] * options.num_prompts
        return random_requests(lengths, sequential.vocab_size, special_ids, rng)

    warm_up, requests = draw(2), draw(options.output_len)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for name, run in engines.items():
        print(f"{name}: warm-up {measure(run, warm_up):.1f} s", flush=True)
    for number in range(options.rounds):
        for name, run in engines.items():
            seconds[name].append(measure(run, requests))
            print(f"{name}: round {number + 1}, {seconds[name][-1]:.1f} s", flush=True)
    report(options, seconds)


def report(options: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    tokens = options.num_prompts * (options.input_len + options.output_len)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: tokens / median for name, median in medians.items()}
    best = {
        library: max(rate for name, rate in rates.items() if name.startswith(library))
        for library in ("nanoflow", "transformers")
    }
    ratio = best["nanoflow"] / best["transformers"]
    print(f"\n{'engine':34}{'total tok/s':>12}{'seconds (median)':>18}")
    for name in seconds:
        print(f"{name:34}{rates[name]:12.0f}{medians[name]:18.1f}")
    print(f"best of nanoflow / best of transformers: {ratio:.2f}")
    if options.output_json is None:
        return
    result = {
        "benchmark": "throughput_vs_transformers",
        "command": environment.command_line(),
        "commit": environment.commit(),
        "versions": environment.versions(("nanoflow", "numpy", "torch", "transformers")),
        "device": environment.cpu_model(),
        "threads": options.threads,
        "model_id": "SmolLM2-135M-Instruct",
        "num_requests": options.num_prompts,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "seed": options.seed,
        "warm_up": "one run of 2 output tokens of each engine, not counted",
        "seconds": seconds,
        "total_token_throughput": rates,
        "ratio": ratio,
    }
    options.output_json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
