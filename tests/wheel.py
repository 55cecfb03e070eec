"""Check a wheel: its size, and that auditwheel finds nothing in it that a Linux system may lack.

Usage: python tests/wheel.py WHEEL --max-mb N     (needs the `dev` extra)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def findings(audit: Mapping[str, Any], megabytes: float, max_mb: float) -> list[str]:
    """What is wrong with a wheel, by what `auditwheel show --json` says of it."""
    found = []
    if megabytes > max_mb:
        found.append(f"it has {megabytes:.1f} MB, more than {max_mb:g}")
    if audit["external_libs"]:
        libraries = ", ".join(audit["external_libs"])
        found.append(f"it needs libraries that manylinux does not promise: {libraries}")
    if not audit["overall_tag"].startswith("manylinux_"):
        found.append(f"it fits no manylinux tag, only {audit['overall_tag']}")
    if audit["unsupported_isa"]:
        found.append("its code needs instructions that not all such machines have")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--max-mb", type=float, required=True)
    options = parser.parse_args()
    command = [sys.executable, "-m", "auditwheel", "show", "--json", str(options.wheel)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    audit = json.loads(done.stdout)
    megabytes = options.wheel.stat().st_size / 1e6
    print(f"{options.wheel.name}: {megabytes:.2f} MB, {audit['overall_tag']}")
    found = findings(audit, megabytes, options.max_mb)
    for one in found:
        print(f"{options.wheel.name}: {one}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
