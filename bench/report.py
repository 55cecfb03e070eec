"""Print the results tables of README.md from the JSON files under bench/results.

python bench/report.py            # print it
python bench/report.py --update   # and put it into README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path("bench/results")
CPU = RESULTS / "cpu"
BEGIN = "<!-- results: python bench/report.py -->\n"
END = "<!-- end of results -->\n"

Result = Mapping[str, Any]


def throughput_rows(result: Result) -> list[tuple[str, str]]:
    load = (
        f"{result['num_requests']} requests, {result['input_len']} tokens in, "
        f"{result['output_len']} out"
    )
    return [
        (f"{load}: {engine}", f"{rate:.0f} total tok/s")
        for engine, rate in result["total_token_throughput"].items()
    ] + [("best nanoflow beside best transformers", f"{result['ratio']:.2f} times")]


def overhead_rows(result: Result) -> list[tuple[str, str]]:
    return [
        (
            f"scheduler's work on a step of {row['running']} running requests, "
            f"{row['engine']}, mean (p99)",
            f"{row['mean_ms']:.2f} ms ({row['p99_ms']:.2f} ms)",
        )
        for row in result["results"]
    ]


def cold_start_rows(result: Result) -> list[tuple[str, str]]:
    median = result["median_seconds"]
    return [("process start to first token, files cached", f"{median['total']:.2f} s")]


def compare_rows(result: Result) -> list[tuple[str, str]]:
    load = (
        f"{result['num_requests']} requests, {result['mean_input_len']:.0f} tokens in, "
        f"{result['mean_output_len']:.0f} out, each in its own environment"
    )
    return [
        (f"{load}: {engine_name(name, one)}", rate_and_share(one))
        for name, one in result["engines"].items()
    ] + [
        (f"best nanoflow beside {name}", f"{ratio:.2f} times")
        for name, ratio in result["nanoflow_over_peer"].items()
    ]


def round_rows(result: Result) -> list[tuple[str, str]]:
    load = f"{result['conversations']} conversations of {result['rounds']} rounds"
    cost = result.get("without_reuse")
    rows = [
        (
            f"{load}, tiers of the KV cache: {row['mode']}",
            f"{row['prefill_tokens_computed']:,} prompt tokens computed, "
            f"{row['cpu_seconds']:.0f} s of CPU time",
        )
        for row in result["results"]
    ]
    if cost is not None:
        what = f"beside none, {cost['requests']} requests with nothing in common"
        for mode in sorted(cost.keys() - {"requests"}):
            rows.append((f"{mode} {what}", f"{cost[mode]['cpu_seconds_added']:+.1%} CPU time"))
    return rows


def engine_name(name: str, engine: Result) -> str:
    """With the version of its package, the first after Python's, and the dtype."""
    version = next(v for package, v in engine["versions"].items() if package != "python")
    return f"{name} {version}, {engine['dtype']}"


def rate_and_share(engine: Result) -> str:
    share = engine["share_of_gemm_peak"]
    peak = "" if share is None else f", {share:.0%} of the GEMM peak"
    return f"{engine['total_tok_s']:.0f} total tok/s{peak}"


# The rows of each file, as far as it is there.
ROWS: Mapping[str, Callable[[Result], list[tuple[str, str]]]] = {
    "compare.json": compare_rows,
    "transformers.json": throughput_rows,
    "cold_start.json": cold_start_rows,
    "scheduler_overhead.json": overhead_rows,
    "multi_round.json": round_rows,
}


def cpu_table(root: Path) -> str:
    """With what it was measured on and the command behind every row."""
    lines = ["| what | result | JSON, command |", "| --- | --- | --- |"]
    devices = {}
    for name, rows_of in ROWS.items():
        if not (root / CPU / name).exists():
            continue
        result = json.loads((root / CPU / name).read_text())
        devices[result["device"]] = None
        source = f"[{name}]({CPU / name}), `{result['command']}`"
        for what, value in rows_of(result):
            lines.append(f"| {what} | {value} | {source} |")
            source = "″"
    return f"SmolLM2-135M-Instruct on {'; '.join(devices)}.\n\n" + "\n".join(lines) + "\n"


def gpu_results(root: Path) -> dict[str, Result]:
    """Runs of whole models on GPUs by their paths; what times single kernels is left out."""
    paths = sorted(path for path in (root / RESULTS).glob("*/*.json") if path.parent.name != "cpu")
    found = {str(path.relative_to(root)): json.loads(path.read_text()) for path in paths}
    return {path: result for path, result in found.items() if "workload" in result}


def is_peer(result: Result) -> bool:
    return "engine" in result


def gpu_table(root: Path) -> str:
    """A row for every steady state, with the whole run and the peers on the same GPU beside it."""
    results = gpu_results(root)
    peers = sorted({r["schedule"] for r in results.values() if is_peer(r)})
    head = ["workload, schedule", "total tok/s", "whole run", *peers, "W", "MHz", "mJ/token"]
    head += ["step ms", "kernels ms", "GPU idle %", "of GEMM peak %"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    gpus = {}
    for path, result in results.items():
        if is_peer(result) or result["measured"] == "whole run":
            continue
        gpus[result["gpu"]] = None
        beside = {
            "whole run" if other["measured"] == "whole run" else other["schedule"]: other
            for other in results.values()
            if all(other[key] == result[key] for key in ("gpu", "model", "workload"))
            and (is_peer(other) or other["schedule"] == result["schedule"])
        }
        lines.append(gpu_row(path, result, beside, peers))
    if not gpus:
        return ""
    return (
        f"Random weights of the named shape on one {' or '.join(gpus)}: steady state, in tokens of "
        "prompt and output, as [steady.py](python/nanoflow/bench/steady.py) defines it. Each JSON "
        "has its command.\n\n" + "\n".join(lines) + "\n"
    )


def gpu_row(path: str, result: Result, beside: Mapping[str, Result], peers: Sequence[str]) -> str:
    def number(value: float | None, digits: int, scale: float = 1.0) -> str:
        return "" if value is None else f"{value * scale:.{digits}f}"

    ceiling = result["gemm_ceiling_tflops"]
    peak = result["matrix_tflops"] / ceiling if ceiling else None
    others = [("whole run", "total_tok_s"), *((peer, "steady_total_tok_s") for peer in peers)]
    cells = [
        f"[{result['model']} {result['workload']}, {result['schedule']}]({path})",
        f"**{number(result['steady_total_tok_s'], 0)}**",
        *(number(beside[name][key] if name in beside else None, 0) for name, key in others),
        number(result["watts"], 0),
        number(result["sm_mhz"], 0),
        number(result["j_per_token"], 1, 1e3),
        number(result["step_ms"], 2),
        number(result["kernel_sum_ms"], 2),
        number(result["gpu_idle_pct"], 1),
        number(peak, 0, 100),
    ]
    return f"| {' | '.join(cells)} |"


def table(root: Path = ROOT) -> str:
    """Both tables in Markdown."""
    return "\n".join(filter(None, (gpu_table(root), cpu_table(root))))


def replace(readme: str, fresh: str) -> str:
    """README's text with the part between its two marks replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"README.md lacks the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}\n{fresh}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    print(table(), end="")
    if options.update:
        readme = ROOT / "README.md"
        readme.write_text(replace(readme.read_text(), table()))


if __name__ == "__main__":
    main()
