"""How long each file of a Ninja build took to compile, from its log; an error for those too slow.

Usage: python tests/compile_times.py BUILD [--limit SECONDS] [--show N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def read_times(log: str) -> dict[str, float]:
    """Seconds by object file, of its last compilation; longest first."""
    times: dict[str, float] = {}
    for line in log.splitlines():
        if line.startswith("#"):
            continue
        begin_ms, end_ms, _, output, _ = line.split("\t")
        if output.endswith(".o"):
            times[output] = (int(end_ms) - int(begin_ms)) / 1000
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("build", type=Path, help="a folder with a .ninja_log")
    parser.add_argument("--limit", type=float, default=150, help="seconds a file may take")
    parser.add_argument("--show", type=int, default=12, help="how many of the slowest to print")
    options = parser.parse_args(arguments)
    times = read_times((options.build / ".ninja_log").read_text(encoding="utf-8"))
    for output, seconds in list(times.items())[: options.show]:
        print(f"{seconds:7.1f} s  {output}")
    print(f"{sum(times.values()):7.1f} s  all {len(times)} files together")
    slow = [output for output, seconds in times.items() if seconds > options.limit]
    for output in slow:
        print(f"{output} took more than {options.limit:.0f} s: split it", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
