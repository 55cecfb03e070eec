"""`bench latency`: how long a batch takes to its last token, as vLLM's command."""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from nanoflow.arguments import add_engine_arguments
from nanoflow.bench import result
from nanoflow.bench.datasets import Lengths, random_requests
from nanoflow.bench.default_model import llm_arguments
from nanoflow.bench.throughput import sampling_params
from nanoflow.bench.throughput_run import target_of
from nanoflow.llm import LLM

PERCENTAGES = (10, 25, 50, 75, 90, 99)


def add_latency_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_latency)
    add = parser.add_argument
    add("--input-len", type=int, default=32, help="(default: 32)")
    add("--output-len", type=int, default=128, help="(default: 128)")
    add("--batch-size", type=int, default=8, help="requests given at once (default: 8)")
    add("--n", type=int, default=1, help="outputs of each prompt (default: 1)")
    add("--num-iters-warmup", type=int, default=10, help="batches not counted (default: 10)")
    add("--num-iters", type=int, default=30, help="batches (default: 30)")
    add("--disable-detokenize", action="store_true", help="leave out making text of the output")
    add("--output-json", type=Path, metavar="FILE", help="write the result")
    add("--commit", help="what the result says was measured (default: as git says)")
    add_engine_arguments(parser)


def run_latency(options: argparse.Namespace) -> None:
    """Raises ValueError on numbers that make no batch, or one that the model has no room for."""
    _check(options)
    arguments = {"enable_prefix_caching": False} | llm_arguments(options)
    with LLM(**arguments) as llm:
        total, limit = options.input_len + options.output_len, llm.limits.max_model_len
        if total > limit:
            raise ValueError(
                f"requests of {total} tokens exceed max_model_len {limit}: lower --input-len or "
                "--output-len, or raise --max-model-len"
            )
        latencies = _measure(llm, options)
        found = {
            **summary(latencies),
            "input_len": options.input_len,
            "output_len": options.output_len,
            "batch_size": options.batch_size,
            "n": options.n,
            "warm_up": f"{options.num_iters_warmup} batches of the same prompts, not counted",
            **result.circumstances(
                llm.args, llm.limits, llm.memory, llm.device_description, options.commit
            ),
        }
    print(f"Avg latency: {found['avg_latency']} seconds")
    for percentage, latency in found["percentiles"].items():
        print(f"{percentage}% percentile latency: {latency} seconds")
    if options.output_json is not None:
        result.write(options.output_json, found)


def summary(latencies: list[float]) -> dict[str, Any]:
    """The fields of `vllm bench latency`, in seconds."""
    percentiles = np.percentile(latencies, PERCENTAGES)
    return {
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": dict(zip(map(str, PERCENTAGES), percentiles.tolist(), strict=True)),
    }


def _check(options: argparse.Namespace) -> None:
    for name in ("input_len", "output_len", "batch_size", "n", "num_iters"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(options, name)} must be at least 1")
    if options.num_iters_warmup < 0:
        raise ValueError(f"--num-iters-warmup {options.num_iters_warmup} must be at least 0")


def _measure(llm: LLM, options: argparse.Namespace) -> list[float]:
    """Seconds of each batch."""
    target = target_of(llm)
    lengths = [Lengths(options.input_len, options.output_len)] * options.batch_size
    rng = np.random.default_rng(llm.args.seed)
    requests = random_requests(lengths, target.vocab_size, target.special_ids, rng)
    prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
    params = sampling_params(
        requests,
        temperature=1.0,
        detokenize=not options.disable_detokenize,
        seed=llm.args.seed,
        n=options.n,
    )
    seconds = []
    for _ in range(options.num_iters_warmup + options.num_iters):
        begin = perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds.append(perf_counter() - begin)
    return seconds[options.num_iters_warmup :]
