"""`bench startup`: from the start of a process until an LLM is ready, as vLLM's command.

A cold start finds the model's files on disk, a warm one in the page cache. Nothing is compiled at
the start, so there is no other cache between the two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanoflow.arguments import add_engine_arguments
from nanoflow.bench import environment, result
from nanoflow.bench.default_model import llm_arguments
from nanoflow.errors import EngineError

PERCENTAGES = (10, 25, 50, 75, 90, 99)
# prctl's first argument is PR_SET_PDEATHSIG: who is killed here leaves no start going on.
CHILD = """
import ctypes, json, signal, sys, time
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
begin = time.time()
from nanoflow import LLM
imported = time.time()
try:
    llm = LLM(**json.loads(sys.argv[1]))
except Exception as error:
    raise SystemExit(f"{type(error).__name__}: {error}")
seconds = {"import": imported - begin, **llm.start_seconds}
print(json.dumps({"ready": time.time(), "seconds": seconds, "device": llm.device_description}))
"""


def add_startup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_startup)
    add = parser.add_argument
    add("--num-iters-cold", type=int, default=3, help="cold starts (default: 3)")
    add("--num-iters-warmup", type=int, default=1, help="warm starts not counted (default: 1)")
    add("--num-iters-warm", type=int, default=3, help="warm starts (default: 3)")
    add("--output-json", type=Path, metavar="FILE", help="write the result")
    add("--commit", help="what the result says was measured (default: as git says)")
    add_engine_arguments(parser)


def run_startup(options: argparse.Namespace) -> None:
    """Raises ValueError on numbers of starts that make no sense, EngineError where one fails."""
    for name in ("num_iters_cold", "num_iters_warmup", "num_iters_warm"):
        least = int(name == "num_iters_warm")
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(options, name)} must be at least {least}")
    arguments = llm_arguments(options)
    model = str(arguments["model"])
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for _ in range(options.num_iters_cold):
        drop_from_cache(Path(model))
        starts["cold"].append(start_once(arguments))
    for _ in range(options.num_iters_warmup):
        start_once(arguments)
    starts["warm"] = [start_once(arguments) for _ in range(options.num_iters_warm)]
    found: dict[str, Any] = {}
    for kind, runs in starts.items():
        if runs:
            found |= summary(kind, runs)
    found |= {
        "model_id": environment.without_folders(model),
        "device": starts["warm"][-1]["device"],
        **environment.origin(options.commit),
    }
    for kind, runs in starts.items():
        if runs:
            times = found[f"{kind}_startup_phases"].items()
            phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times)
            print(f"Avg {kind} startup time: {found[f'avg_{kind}_startup_time']:.2f} s ({phases})")
    if options.output_json is not None:
        result.write(options.output_json, found)


def drop_from_cache(model: Path) -> None:
    """Asks the system to forget the contents of a model's files; it keeps those it needs."""
    files = [model] if model.is_file() else [path for path in model.glob("*") if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start_once(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a start in a process of its own, by phase and in all. Raises EngineError."""
    command = [sys.executable, "-c", CHILD, json.dumps(dict(arguments), default=str)]
    begin = time.time()  # a clock that both processes read
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode != 0:
        raise EngineError(f"the start failed: {child.stderr.strip().splitlines()[-1]}")
    found = json.loads(child.stdout)
    total = found["ready"] - begin
    seconds = {"interpreter": total - sum(found["seconds"].values()), **found["seconds"]}
    return {"total": total, "seconds": seconds, "device": found["device"]}


def summary(kind: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of `vllm bench startup`, in seconds, and the mean of each phase."""
    totals = [run["total"] for run in runs]
    percentiles = np.percentile(totals, PERCENTAGES).tolist()
    return {
        f"avg_{kind}_startup_time": float(np.mean(totals)),
        f"{kind}_startup_times": totals,
        f"{kind}_startup_percentiles": dict(zip(map(str, PERCENTAGES), percentiles, strict=True)),
        f"{kind}_startup_phases": {
            phase: float(np.mean([run["seconds"][phase] for run in runs]))
            for phase in runs[0]["seconds"]
        },
    }
