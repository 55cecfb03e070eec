"""Turns what a peer's benchmark printed into result files like nanoflow's own.

python bench/peer_result.py vllm.jsonl --gpu "NVIDIA H100 80GB HBM3" --result-dir bench/results

Every line of the input is a JSON object of one run: `peer`, `version`, `work` ("512x512" or
"trace:FILE"), `engine` (its settings), `wall_s`, `mean_in`, `mean_out`, `total_tok_s` and
`out_tok_s` of finished requests, `partial` when the run was cut short, and where they are known
`counters` (tokens of requests that had not finished, too), `kv_tokens`, `watts`, `sm_mhz`, and
`reports`: of what the engine logged of itself every few seconds, in order, lists of its prompt and
generation tokens a second and of the requests running and waiting then; with `max_num_seqs`.

The steady state of a peer is the highest rate that its run gives reason for, where nanoflow's own
is the lowest (nanoflow/bench/steady.py): output tokens a second times (input + output) / output;
all tokens counted, the prompts of the ramp among them; and, where there are such, the mean of the
reports that began and ended with all slots in use (at least 99 % of `max_num_seqs` running, others
waiting), as this report and the one before it tell: the ramp and the last requests are not among
them. A comparison is not to gain from how it is counted. The rate at which requests finish does
not count: those that began together end together, at a rate at which nothing was computed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nanoflow.bench.result import USUAL_MODEL, result_path

STEADY = (
    "the highest of (a) output tokens a second x (mean input + mean output) / mean output, (b) all "
    "tokens counted a second, (c) prompt and output tokens a second, the mean of the engine's "
    "reports that began and ended with all slots in use"
)
IN_USE = 0.99  # of the slots: requests that end leave some empty for a step


def steady_total_tok_s(run: Mapping[str, Any]) -> float:
    factor = (run["mean_in"] + run["mean_out"]) / run["mean_out"]
    counters = run.get("counters", {})
    rates = [
        run["total_tok_s"],
        counters.get("counted_total_tok_s", 0.0),
        counters.get("counted_out_tok_s", run["out_tok_s"]) * factor,
    ]
    if reports := rates_at_full_load(run):
        rates.append(fmean(reports))
    return float(max(rates))


def rates_at_full_load(run: Mapping[str, Any]) -> list[float]:
    """Total tokens a second of the reports that began and ended with all slots in use."""
    reports = run.get("reports", [])
    full = [
        running >= IN_USE * run["max_num_seqs"] and waiting > 0
        for _, _, running, waiting in reports
    ]
    return [
        prompt + generation
        for (prompt, generation, *_), began, ended in zip(reports[1:], full, full[1:], strict=False)
        if began and ended
    ]


def to_result(run: Mapping[str, Any], gpu: str, model: str, command: str) -> dict[str, Any]:
    counters = run.get("counters", {})
    steady = steady_total_tok_s(run)
    watts = run.get("watts")
    kind, _, trace = run["work"].partition("trace:")
    return {
        "gpu": gpu,
        "model": model,
        "workload": Path(trace).stem if trace else kind,
        "schedule": f"{run['peer']}-{run['version']}",
        "measured": f"the first {run['wall_s']:.0f} s" if run["partial"] else "all requests",
        "total_tok_s": counters.get("counted_total_tok_s", run["total_tok_s"]),
        "output_tok_s": counters.get("counted_out_tok_s", run["out_tok_s"]),
        "steady_total_tok_s": steady,
        "steady_state": {"definition": STEADY},
        "watts": watts,
        "sm_mhz": run.get("sm_mhz"),
        "j_per_token": watts / steady if watts else None,
        "gemm_ceiling_tflops": None,
        "kernel_sum_ms": None,
        "step_ms": None,
        "gpu_idle_pct": None,
        "commit": None,
        "command": command,
        "seed": 0,
        "engine": run["engine"],
        "run": dict(run),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("lines", type=Path, help="one JSON object a line")
    parser.add_argument("--gpu", required=True, help="as the driver calls it")
    parser.add_argument("--model", default=USUAL_MODEL)
    parser.add_argument("--command", default="", help="that was run")
    parser.add_argument("--result-dir", type=Path, required=True)
    options = parser.parse_args(arguments)
    for line in options.lines.read_text().splitlines():
        found = to_result(json.loads(line), options.gpu, options.model, options.command)
        path = result_path(options.result_dir, found)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{path}: {found['steady_total_tok_s']:.0f} total tok/s")


if __name__ == "__main__":
    main()
