"""Print the results table of README.md from the JSON files under bench/results/cpu.

python bench/report.py            # print it
python bench/report.py --update   # and put it into README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path("bench/results/cpu")
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
            f"scheduler's work on a step of {row['running']} running requests, mean (p99)",
            f"{row['mean_ms']:.2f} ms ({row['p99_ms']:.2f} ms)",
        )
        for row in result["results"]
    ]


def cold_start_rows(result: Result) -> list[tuple[str, str]]:
    median = result["median_seconds"]
    return [("process start to first token, files cached", f"{median['total']:.2f} s")]


ROWS: Mapping[str, Callable[[Result], list[tuple[str, str]]]] = {
    "transformers.json": throughput_rows,
    "cold_start.json": cold_start_rows,
    "scheduler_overhead.json": overhead_rows,
}


def table(root: Path = ROOT) -> str:
    """The table in Markdown, with what it was measured on and the command behind every row."""
    lines = ["| what | result | JSON, command |", "| --- | --- | --- |"]
    devices = {}
    for name, rows_of in ROWS.items():
        result = json.loads((root / RESULTS / name).read_text())
        devices[result["device"]] = None
        source = f"[{name}]({RESULTS / name}), `{result['command']}`"
        for what, value in rows_of(result):
            lines.append(f"| {what} | {value} | {source} |")
            source = "″"
    head = f"SmolLM2-135M-Instruct on {'; '.join(devices)}.\n\n"
    return head + "\n".join(lines) + "\n"


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
