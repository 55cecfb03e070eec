"""`bench serve`: requests that arrive one by one at an engine in this process.

The flags and fields are those of `vllm bench serve`, without those of a server's address.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from nanoflow.arguments import add_engine_arguments
from nanoflow.async_llm import AsyncLLM
from nanoflow.bench import result, serve_metrics
from nanoflow.bench.default_model import llm_arguments
from nanoflow.bench.serve_flags import (
    check_duration,
    parse_goodput,
    parse_metadata,
    parse_metrics,
    parse_percentiles,
    parse_ramp,
)
from nanoflow.bench.serve_run import RAMPS, Ramp, arrival_times, ramp_times, serve
from nanoflow.bench.workload import Target, Workload, add_workload_arguments, make_workload

BACKEND = "nanoflow"
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_serve)
    add_workload_arguments(parser)
    add = parser.add_argument
    add(
        "--request-rate",
        type=float,
        nargs="+",
        default=[math.inf],
        metavar="RATE",
        help="requests a second, a run for each rate (default: inf, all at once)",
    )
    add(
        "--duration",
        type=float,
        help="seconds of arrivals at each rate, instead of --num-prompts (the paper: 300)",
    )
    add(
        "--burstiness",
        type=float,
        default=1.0,
        help="shape of the gamma-distributed gaps: below 1 bursts, 1 Poisson, above evener",
    )
    add("--ramp-up-strategy", choices=RAMPS, help="let the rate grow, instead of --request-rate")
    add("--ramp-up-start-rps", type=float, help="requests a second at first")
    add("--ramp-up-end-rps", type=float, help="and at last")
    add("--max-concurrency", type=int, help="requests on their way at once (default: any number)")
    add("--ignore-eos", action="store_true", help="generate all tokens, whatever is sampled")
    for name in SAMPLING:
        kind = int if name == "top_k" else float
        add(f"--{name.replace('_', '-')}", type=kind, help="(default: the model's own, or none)")
    add(
        "--slo-ms",
        type=float,
        default=serve_metrics.SLO_MS,
        help="limit of the mean latency per output token (default: 200, the paper's)",
    )
    add(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="count requests within these limits, as in ttft:500 tpot:50",
    )
    add(
        "--percentile-metrics",
        default="ttft,tpot,itl",
        help="what to print, of ttft, tpot, itl, e2el (default: ttft,tpot,itl)",
    )
    add("--metric-percentiles", default="99", help="as in 50,90,99 (default: 99)")
    _add_output_arguments(parser)
    add_engine_arguments(parser)


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output-json", type=Path, metavar="FILE", help="write all runs to one file")
    add("--save-result", action="store_true", help="write each run to a file of its own")
    add("--save-detailed", action="store_true", help="with what happened to each request")
    add("--append-result", action="store_true", help="add to the file, a line for each run")
    add("--result-dir", type=Path, default=Path(), help="(default: the current one)")
    add("--result-filename", help="(default: BACKEND-RATEqps-MODEL-TIME.json)")
    add("--metadata", nargs="+", default=[], metavar="KEY=VALUE", help="more fields of the result")
    add("--label", help="instead of BACKEND in the name of the file, and in the result")
    add("--commit", help="what the result says was measured (default: as git says)")


def run_serve(options: argparse.Namespace) -> None:
    """Raises ValueError on flags that do not fit together, or a workload that does not fit."""
    workload = make_workload(options)
    metrics, percentiles = parse_metrics(options), parse_percentiles(options)
    goodput, metadata = parse_goodput(options.goodput), parse_metadata(options.metadata)
    for rate in options.request_rate:
        arrival_times(1, rate, options.burstiness, np.random.default_rng(0))
    ramp = parse_ramp(options)
    if options.duration is not None:
        check_duration(options)
    if options.max_concurrency is not None and options.max_concurrency < 1:
        raise ValueError(f"--max-concurrency {options.max_concurrency} must be at least 1")
    writes_one = options.result_filename is not None and not options.append_result
    if len(options.request_rate) > 1 and writes_one:
        raise ValueError("--result-filename is one file for several rates: add --append-result")
    arguments = llm_arguments(options)
    llm = AsyncLLM(**arguments)
    try:
        runs = asyncio.run(_measure_rates(llm, workload, options, ramp, percentiles, goodput))
    finally:
        llm.shutdown()
    for run, served in runs:
        run |= metadata
        print(serve_metrics.lines(run, metrics, percentiles))
        if options.save_result or options.append_result:
            more = serve_metrics.details(served) if options.save_detailed else {}
            _save(run | more, options)
    rates = [run for run, _ in runs]
    if len(rates) > 1:
        print(rate_table(rates))
    if options.output_json is not None:
        content = rates[0] if len(rates) == 1 else _all_rates(rates)
        result.write(options.output_json, content)


async def _measure_rates(
    llm: AsyncLLM,
    workload: Workload,
    options: argparse.Namespace,
    ramp: Ramp | None,
    percentiles: Sequence[float],
    goodput: dict[str, float],
) -> list[tuple[dict[str, Any], list[serve_metrics.Served]]]:
    """The result of each request rate, and what its clients saw."""
    tokenizer = None if llm.args.skip_tokenizer_init else await llm.get_tokenizer()
    target = Target(llm.limits.max_model_len, llm.model_config.vocab_size, tokenizer)
    rng = np.random.default_rng(llm.args.seed)
    values = {name: getattr(options, name) for name in SAMPLING}
    chosen = {name: value for name, value in values.items() if value is not None}
    params = replace(
        llm.get_default_sampling_params(),
        seed=llm.args.seed,
        ignore_eos=options.ignore_eos,
        **chosen,
    )
    how = {"params": params, "max_concurrency": options.max_concurrency}
    if options.num_warmups > 0:
        few = workload.draw(options.num_warmups, target, rng)
        await serve(llm, few, [0.0] * len(few), **how)
    runs = []
    for rate in options.request_rate:
        count = workload.num_prompts
        if options.duration is not None:
            count = max(1, round(rate * options.duration))
        requests = workload.draw(count, target, rng)
        await llm.reset_prefix_cache()  # which has seen these prompts, where they are few
        if ramp is not None:
            arrivals = ramp_times(ramp, len(requests), options.burstiness, rng)
        else:
            arrivals = arrival_times(len(requests), rate, options.burstiness, rng)
        served, duration = await serve(llm, requests, arrivals, **how)
        found = serve_metrics.summary(
            served, duration, percentiles=percentiles, goodput=goodput, slo_ms=options.slo_ms
        )
        sampling = {name: getattr(params, name) for name in (*SAMPLING, "ignore_eos")}
        identity = _identity(llm, workload, options, rate, len(requests))
        runs.append((identity | sampling | found, served))
    return runs


def _identity(
    llm: AsyncLLM, workload: Workload, options: argparse.Namespace, rate: float, count: int
) -> dict[str, Any]:
    circumstances = result.circumstances(
        llm.args, llm.limits, llm.memory, llm.device_description, options.commit
    )
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": BACKEND,
        "backend": BACKEND,
        "label": options.label,
        "model_id": circumstances.pop("model_id"),
        "tokenizer_id": None if llm.args.tokenizer is None else str(llm.args.tokenizer),
        "num_prompts": count,
        "request_rate": "inf" if math.isinf(rate) else rate,  # JSON knows no infinity
        "burstiness": options.burstiness,
        "ramp_up_strategy": options.ramp_up_strategy,
        "ramp_up_start_rps": options.ramp_up_start_rps,
        "ramp_up_end_rps": options.ramp_up_end_rps,
        "max_concurrency": options.max_concurrency,
        "traffic": workload.name,
        "warm_up": f"{options.num_warmups} requests at once, not counted",
        **circumstances,
    }


def rate_table(runs: Sequence[dict[str, Any]]) -> str:
    """A line for each request rate: how it is met, and at what latency per output token."""
    lines = [f"{'req/s':>8}{'done req/s':>12}{'total tok/s':>13}{'ms/token':>10}{'p99':>9}  SLO"]
    for run in runs:
        lines.append(
            f"{run['request_rate']!s:>8}{run['request_throughput']:12.2f}"
            f"{run['total_token_throughput']:13.0f}{run['mean_normalized_latency_ms']:10.1f}"
            f"{_last_percentile(run):9.1f}  {'met' if run['within_slo'] else 'missed'}"
        )
    return "\n".join(lines)


def _last_percentile(run: dict[str, Any]) -> float:
    names = [name for name in run if name.endswith("_normalized_latency_ms")]
    return float(run[names[-1]])


def _all_rates(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    within = [run["request_rate"] for run in runs if run["within_slo"]]
    return {
        "slo_ms": runs[0]["slo_ms"],
        "max_request_rate_within_slo": max(within, key=float) if within else None,
        "runs": list(runs),
    }


def _save(run: dict[str, Any], options: argparse.Namespace) -> None:
    model = Path(run["model"]).name
    limit = "" if run["max_concurrency"] is None else f"-concurrency{run['max_concurrency']}"
    name = f"{run['label'] or BACKEND}-{run['request_rate']}qps{limit}-{model}-{run['date']}.json"
    path = options.result_dir / (options.result_filename or name)
    result.write(path, run, appends=options.append_result)
