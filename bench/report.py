"""Makes the tables of README.md and bench/results/README.md from the JSON files of bench/results.

python bench/report.py            # print README.md's
python bench/report.py --update   # and put both in their places

README.md has what matters most; the other everything.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path("bench/results")
BEGIN = "<!-- results: python bench/report.py -->\n"
END = "<!-- end of results -->\n"
USUAL = ("sequential", "nano", "auto")  # schedules with columns of their own
FIRST = "512x512"  # of the workloads

Result = Mapping[str, Any]
Rows = list[tuple[str, str]]


def throughput_rows(result: Result) -> Rows:
    load = (
        f"{result['num_requests']} requests, {result['input_len']} tokens in, "
        f"{result['output_len']} out"
    )
    return [
        (f"{load}: {engine}", f"{rate:.0f} total tok/s")
        for engine, rate in result["total_token_throughput"].items()
    ] + [("best nanoflow beside best transformers", f"{result['ratio']:.2f} times")]


def overhead_rows(result: Result) -> Rows:
    return [
        (
            f"scheduler's work on a step of {row['running']} running requests, "
            f"{row['engine']}, mean (p99)",
            f"{row['mean_ms']:.2f} ms ({row['p99_ms']:.2f} ms)",
        )
        for row in result["results"]
    ]


def cold_start_rows(result: Result) -> Rows:
    median = result["median_seconds"]
    return [("process start to first token, files cached", f"{median['total']:.2f} s")]


def compare_rows(result: Result) -> Rows:
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


def round_rows(result: Result) -> Rows:
    load = f"{result['conversations']} conversations of {result['rounds']} rounds"
    cost = result.get("without_reuse")
    rows = [
        (
            f"{load}, tiers of the KV cache: {row['mode']}",
            f"{row['prefill_tokens_computed']:,} prompt tokens computed, "
            f"{row['total_tokens_per_second']:,.0f} total tok/s, {row['cpu_seconds']:.0f} s of CPU",
        )
        for row in result["results"]
    ]
    if cost is not None:
        what = f"beside none, {cost['requests']} requests with nothing in common"
        for mode in sorted(cost.keys() - {"requests"}):
            one = cost[mode]
            on_cpu = f"{one['cpu_seconds_added']:+.1%} CPU time"
            lost = f"{-one['lost']:+.1%} throughput"
            rows.append((f"{mode} {what}", on_cpu if "gpu" not in result else lost))
    return rows


def constrained_rows(result: Result) -> Rows:
    """Of runs in which some requests carry an option; in the first none does."""
    load = f"{result['num_requests']} requests, {result['input_len']} tokens in"
    load += f", {result['output_len']} out"
    rows = []
    for row in result["results"][1:]:
        cost = f"{row['cpu_seconds_of_unconstrained'] - 1:+.1%} CPU time"
        beside = row["plain_seconds_of_unconstrained"]
        if beside is not None:
            cost += f", time of the others {beside - 1:+.1%}"
        rows.append((f"{load}, {row['share']:.0%} of them with {row['kind']}, beside none", cost))
    return rows


def engine_name(name: str, engine: Result) -> str:
    """With the version of its package, the first after Python's, and the dtype."""
    version = next(v for package, v in engine["versions"].items() if package != "python")
    return f"{name} {version}, {engine['dtype']}"


def rate_and_share(engine: Result) -> str:
    share = engine["share_of_gemm_peak"]
    peak = "" if share is None else f", {share:.0%} of the GEMM peak"
    return f"{engine['total_tok_s']:.0f} total tok/s{peak}"


# The rows of each file, as far as a folder has it.
ROWS: Mapping[str, Callable[[Result], Rows]] = {
    "compare.json": compare_rows,
    "transformers.json": throughput_rows,
    "cold_start.json": cold_start_rows,
    "scheduler_overhead.json": overhead_rows,
    "multi_round.json": round_rows,
    "without_reuse.json": round_rows,
    "multi_round_ssd.json": round_rows,
    "constrained.json": constrained_rows,
}
HIGHLIGHTS = ("cpu/compare.json", "h200/cold_start.json", "h200/multi_round.json")


def others(root: Path, names: Sequence[str] | None = None) -> str:
    """A row for each of their results, with what it was measured on. None: of all files."""
    paths = sorted((root / RESULTS).glob("*/*.json"))
    found = [path for path in paths if path.name in ROWS]
    if names is not None:
        found = [path for path in found if f"{path.parent.name}/{path.name}" in names]
    lines = ["| what | result | where, JSON with its command |", "| --- | --- | --- |"]
    for path in found:
        result = json.loads(path.read_text())
        model = result.get("model", result.get("model_id", "SmolLM2-135M-Instruct"))
        source = f"{model}, {result['device']}: [{path.name}]({path.relative_to(root)})"
        for what, value in ROWS[path.name](result):
            lines.append(f"| {what} | {value} | {source} |")
            source = "″"
    return "\n".join(lines) + "\n" if found else ""


def gpu_results(root: Path) -> dict[str, Result]:
    """Runs of whole models on GPUs by their paths; what times single kernels is left out.

    The last are those of peers with ours of the same GPU beside them.
    """
    paths = sorted(path for path in (root / RESULTS).glob("*/*.json") if path.parent.name != "cpu")
    found = {str(path.relative_to(root)): json.loads(path.read_text()) for path in paths}
    runs = {path: result for path, result in found.items() if "workload" in result}
    return runs | dict(beside_peers(root))


def beside_peers(root: Path) -> Iterator[tuple[str, Result]]:
    """Of folders like beside-vllm: a peer's runs, as `ours` the best schedule of the same GPU."""
    for path in sorted((root / RESULTS).glob("*/beside-*/*.json")):
        result = json.loads(path.read_text())
        if "engine" in result:
            ours = path.with_name(path.name.replace(result["schedule"], "nanoflow"))
            best = max(json.loads(ours.read_text())["total_tok_s"].values())
            beside = f"[{best:,.0f}]({ours.relative_to(root)})"
            yield str(path.relative_to(root)), result | {"ours": beside}


def gpu_table(root: Path) -> str:
    """A row for every workload of a model: its schedules beside each other, and beside peers."""
    lines = [
        "| model, workload | sequential | nano-batches alone | best overlap | `auto` | vLLM "
        "| W | MHz | mJ/token | step, its kernels in turn (ms) | GPU idle | of GEMM peak |",
        "| --- " * 12 + "|",
    ]
    gpus: dict[str, None] = {}
    for (gpu, model, workload), group in _groups(gpu_results(root)):
        gpus[gpu] = None
        lines.append(gpu_row(f"{model} {workload}", group))
    if not gpus:
        return ""
    return (
        f"Total tokens (of prompts and outputs) a second and GPU, on {' or '.join(gpus)}, random "
        "weights of the named shape, in a steady state as "
        "[steady.py](python/nanoflow/bench/steady.py) defines it; bold: beside sequential. `auto` "
        "is the default. W (of a GPU) to mJ/token are the overlap's, the rest sequential's. vLLM's "
        "is the highest count of `bench/peer_result.py`; ours beside it is of its GPU, which is "
        "not the row's. Each JSON has its command.\n\n" + "\n".join(lines) + "\n"
    )


def _groups(
    results: Mapping[str, Result],
) -> Iterator[tuple[tuple[str, str, str], dict[str, tuple[str, Result]]]]:
    """By GPU, model and workload: paths and results by schedule."""

    def key(item: tuple[str, Result]) -> tuple[str, str, bool, str]:
        _, result = item
        workload = result["workload"]
        return result["gpu"], _model(result), workload != FIRST, workload

    steady = [item for item in results.items() if item[1]["measured"] != "whole run"]
    for (gpu, model, _, workload), items in itertools.groupby(sorted(steady, key=key), key):
        found = {result["schedule"]: (path, result) for path, result in items}
        yield (gpu, model, workload), found


def _model(result: Result) -> str:
    model, ranks = str(result["model"]), _ranks(result)
    if str(result.get("network")).startswith("none"):
        return f"{model} (one GPU of {ranks}, no network)"
    return model if ranks == 1 else f"{model} ({ranks} GPUs)"


def _ranks(result: Result) -> int:
    return int(result.get("tensor_parallel_size", 1))


def gpu_row(what: str, group: Mapping[str, tuple[str, Result]]) -> str:
    peers = [name for name, (_, result) in group.items() if "engine" in result]
    overlaps = [name for name in group if name not in (*USUAL, *peers)]
    best = max(overlaps, key=lambda name: _rate(group[name]), default=None)
    sequential, overlap = group.get("sequential"), group.get(best or "")
    basis = (sequential or overlap or next(iter(group.values())))[1]
    power = (overlap or sequential or next(iter(group.values())))[1]
    ceiling = power["gemm_ceiling_tflops"]
    steps = (_number(basis["step_ms"], 1), _number(basis["kernel_sum_ms"], 1))
    cells = [
        what,
        _linked(sequential),
        _linked(group.get("nano")),
        _beside(overlap, sequential),
        _beside(group.get("auto"), sequential),
        ", ".join(_peer(name, group[name]) for name in peers),
        _number(power["watts"], 0, 1 / (power.get("boards") or 1)),
        _number(power["sm_mhz"], 0),
        _number(power["j_per_token"], 1, 1e3),
        ", ".join(filter(None, steps)),
        _number(basis["gpu_idle_pct"], 1, unit=" %"),
        _number(power["matrix_tflops"] / ceiling if ceiling else None, 0, 100, " %"),
    ]
    return f"| {' | '.join(cells)} |"


def _rate(found: tuple[str, Result]) -> float:
    """Of each GPU."""
    return float(found[1]["steady_total_tok_s"]) / _ranks(found[1])


def _linked(found: tuple[str, Result] | None) -> str:
    return "" if found is None else f"[{_rate(found):,.0f}]({found[0]})"


def _beside(found: tuple[str, Result] | None, basis: tuple[str, Result] | None) -> str:
    ratio = f", **{_rate(found) / _rate(basis):.3f}**" if found and basis else ""
    return _linked(found) + ratio


def _peer(name: str, found: tuple[str, Result]) -> str:
    ours = found[1].get("ours")
    beside = "" if ours is None else f"; ours beside it {ours}"
    return f"{_linked(found)} ({name.removeprefix('vllm-')}{beside})"


def _number(value: float | None, digits: int, scale: float = 1.0, unit: str = "") -> str:
    return "" if value is None else f"{value * scale:.{digits}f}{unit}"


def table(root: Path = ROOT) -> str:
    """Those of README.md, in Markdown."""
    return "\n".join(filter(None, (gpu_table(root), others(root, HIGHLIGHTS))))


def everything(root: Path = ROOT) -> str:
    """Those of bench/results/README.md, whose links start there."""
    text = "\n".join(filter(None, (gpu_table(root), others(root))))
    return text.replace(f"]({RESULTS}/", "](").replace("](python/", "](../../python/")


def replace(readme: str, fresh: str) -> str:
    """The text of a README with the part between its two marks replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"README.md lacks the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}\n{fresh}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="put the tables into the READMEs")
    options = parser.parse_args()
    print(table(), end="")
    if options.update:
        for readme, fresh in ((ROOT, table()), (ROOT / RESULTS, everything())):
            path = readme / "README.md"
            path.write_text(replace(path.read_text(), fresh))


if __name__ == "__main__":
    main()
