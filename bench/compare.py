"""The same requests for nanoflow and its peers, each in its own environment, one after the other.

    python bench/as_safetensors.py smollm2
    python bench/compare.py --model smollm2 --num-prompts 64 --input-len 128 --output-len 128 \\
        --peer vllm=/path/to/its/bin/python --peer transformers=python --output-json result.json

Every engine gets all requests at once, greedy, token ids in and out, prefix caches off, on the same
cores. `--peer NAME=PYTHON`: NAME is vllm, sglang or transformers, or one of them with more behind a
hyphen, so that a peer can run with several settings: --peer transformers-f32=python
--set transformers-f32.dtype=float32. nanoflow runs once for each of --schedule, and is then called
nanoflow-SCHEDULE.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cpu_peak import measure_peak
from nanoflow.arguments import ArgumentParser
from nanoflow.bench import environment, result
from nanoflow.bench.datasets import Request
from nanoflow.bench.workload import Target, add_workload_arguments, make_workload
from nanoflow.loading import open_checkpoint
from nanoflow.models.config import ModelConfig
from nanoflow.tokenizer import Tokenizer

PEERS = Path(__file__).parent / "peers"
KINDS = ("vllm", "sglang", "transformers")
WARM_UP_TOKENS = 2  # of all requests


@dataclass(frozen=True, slots=True)
class Engine:
    """What runs the work: a script of bench/peers under some Python."""

    name: str
    kind: str
    python: str
    options: dict[str, Any] = field(default_factory=dict)


def parse_engines(options: argparse.Namespace) -> list[Engine]:
    """nanoflow first. Raises ValueError on a peer that there is not, and a setting of none."""
    engines = [
        Engine(f"nanoflow-{Path(one).stem}", "nanoflow", sys.executable, {"schedule": one})
        for one in options.schedule
    ]
    for word in options.peer:
        name, equals, python = word.partition("=")
        kind = name.partition("-")[0]
        if kind not in KINDS or not equals:
            raise ValueError(f"--peer {word} must be NAME=PYTHON, NAME of {', '.join(KINDS)}")
        engines.append(Engine(name, kind, python))
    names = [engine.name for engine in engines]
    if len(set(names)) < len(names):
        raise ValueError(f"names occur twice: {', '.join(names)}")
    for word in options.set:
        key, _, value = word.partition("=")
        name, _, option = key.rpartition(".")
        chosen = [one for one in engines if name in (one.name, one.kind)]
        if not chosen or not value:
            raise ValueError(f"--set {word} must be NAME.OPTION=VALUE, NAME of {', '.join(names)}")
        for engine in chosen:
            engine.options[option] = _value(value)
    return engines


def _value(text: str) -> Any:
    """JSON, or else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def run_engine(engine: Engine, work: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Raises RuntimeError with the end of what the engine said when it fails."""
    options = dict(engine.options)
    dtype = options.pop("dtype", work["dtype"])
    given, found = scratch / "work.json", scratch / f"{engine.name}.json"
    given.write_text(json.dumps({**work, "dtype": dtype, "options": options}))
    command = [engine.python, str(PEERS / f"{engine.kind}_peer.py"), str(given), str(found)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{engine.name}: cannot run {engine.python}: {error}") from error
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise RuntimeError(f"{engine.name} ended with {done.returncode}:\n{said}")
    return {"dtype": dtype, "options": options, **json.loads(found.read_text())}


def summary(
    found: Mapping[str, Mapping[str, Any]], requests: Sequence[Request], gflop: float, peak: float
) -> dict[str, Any]:
    """Rates of each engine by the median of its rounds, and how nanoflow's best compares.

    `gflop`: of the run's matrix products; `peak`: GFLOP/s of the machine, 0 where it is not known.
    """
    output = sum(request.output_len for request in requests)
    total = output + sum(len(request.prompt_token_ids) for request in requests)
    reference = next(iter(found.values()))["tokens"]
    engines = {}
    for name, run in found.items():
        seconds = statistics.median(run["seconds"])
        engines[name] = {
            **{key: value for key, value in run.items() if key != "tokens"},
            "median_seconds": seconds,
            "total_tok_s": total / seconds,
            "output_tok_s": output / seconds,
            "gflops": gflop / seconds,
            "share_of_gemm_peak": gflop / seconds / peak if peak else None,
            "equal_tokens": equal_share(reference, run["tokens"]),
        }
    best = max(one["total_tok_s"] for name, one in engines.items() if name.startswith("nanoflow-"))
    peers = {name: one for name, one in engines.items() if not name.startswith("nanoflow-")}
    return {
        "engines": engines,
        "nanoflow_over_peer": {name: best / one["total_tok_s"] for name, one in peers.items()},
    }


def equal_share(reference: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> float:
    """The share of the tokens that come before the first difference of their request."""
    equal = count = 0
    for ours, theirs in zip(reference, tokens, strict=True):
        differs = np.flatnonzero(np.array(ours) != np.array(theirs))
        equal += int(differs[0]) if differs.size else len(ours)
        count += len(ours)
    return equal / count


def gflop_of(model: ModelConfig, requests: Sequence[Request]) -> float:
    """Of the matrix products with weights: all tokens but the last of each request pass through
    the layers, those that are generated come from the head.
    """
    output = sum(request.output_len for request in requests)
    rows = output + sum(len(request.prompt_token_ids) - 1 for request in requests)
    return result.matrix_flop(model, rows, output) * 1e-9


def table(found: Mapping[str, Any]) -> str:
    head = f"{'engine':24}{'total tok/s':>12}{'output tok/s':>14}{'seconds':>9}{'load s':>8}"
    lines = [f"{head}{'of GEMM peak':>14}{'equal tokens':>14}"]
    for name, one in found["engines"].items():
        share = one["share_of_gemm_peak"]
        lines.append(
            f"{name:24}{one['total_tok_s']:12.0f}{one['output_tok_s']:14.0f}"
            f"{one['median_seconds']:9.1f}{one['load_seconds']:8.1f}"
            f"{'' if share is None else format(share, '.0%'):>14}{one['equal_tokens']:14.0%}"
        )
    for name, ratio in found["nanoflow_over_peer"].items():
        lines.append(f"best nanoflow beside {name}: {ratio:.2f} times")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with safetensors and a tokenizer")
    add("--peer", action="append", default=[], metavar="NAME=PYTHON", help="may be repeated")
    add("--schedule", nargs="+", default=["sequential", "overlap"], help="of nanoflow")
    add("--set", action="append", default=[], metavar="NAME.OPTION=VALUE", help="may be repeated")
    add("--dtype", default="bfloat16")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a CPU")
    add("--rounds", type=int, default=1, help="runs of each engine; medians count (default: 1)")
    add("--peak-seconds", type=float, default=1.0, help="for each product of cpu_peak.py; 0: none")
    add("--seed", type=int, default=0)
    add("--output-json", type=Path, metavar="FILE")
    add("--commit", help="what the result says was measured (default: as git says)")
    add_workload_arguments(parser)
    return parser


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Raises ValueError on flags that do not fit, RuntimeError when an engine fails."""
    workload = make_workload(options)
    engines = parse_engines(options)
    if options.rounds < 1 or options.threads < 1:
        raise ValueError(f"--rounds {options.rounds} and --threads {options.threads}: at least 1")
    if not options.model.is_dir():
        raise ValueError(
            f"{options.model} is no folder; peers read safetensors: bench/as_safetensors.py writes "
            "them from a GGUF file"
        )
    checkpoint = open_checkpoint(options.model)
    model = checkpoint.model
    tokenizer = Tokenizer.from_source(checkpoint.tokenizer_source)
    target = Target(model.max_position_embeddings, model.vocab_size, tokenizer)
    requests = workload.draw(workload.num_prompts, target, np.random.default_rng(options.seed))
    work = {
        "model": str(options.model.resolve()),
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "max_model_len": max(len(one.prompt_token_ids) + one.output_len for one in requests),
        "rounds": options.rounds,
        "requests": [_as_json(one, one.output_len) for one in requests],
        "warm_up": [_as_json(one, min(WARM_UP_TOKENS, one.output_len)) for one in requests],
    }
    measures_peak = options.device == "cpu" and options.peak_seconds > 0
    peak = measure_peak(options.threads, options.peak_seconds) if measures_peak else None
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for engine in engines:
            found[engine.name] = run_engine(engine, work, Path(scratch))
            print(f"{engine.name}: {found[engine.name]['seconds']} s", flush=True)
    gflop = gflop_of(model, requests)
    return {
        "benchmark": "compare",
        "command": environment.command_line(),
        "commit": options.commit or environment.commit(),
        "device": environment.cpu_model() if options.device == "cpu" else options.device,
        "threads": options.threads,
        "model_id": options.model.name,
        "traffic": workload.name,
        "num_requests": len(requests),
        "mean_input_len": float(np.mean([len(one.prompt_token_ids) for one in requests])),
        "mean_output_len": float(np.mean([one.output_len for one in requests])),
        "seed": options.seed,
        "rounds": options.rounds,
        "warm_up": f"all requests, {WARM_UP_TOKENS} tokens of each, not counted",
        "gflop": gflop,
        "gemm_peak": peak,
        **summary(found, requests, gflop, peak["gflops"] if peak else 0.0),
    }


def _as_json(request: Request, output_len: int) -> dict[str, Any]:
    return {"prompt_token_ids": request.prompt_token_ids, "output_len": output_len}


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        found = compare(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 1
    print(table(found))
    if options.output_json is not None:
        result.write(options.output_json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
