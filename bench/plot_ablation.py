"""Draw the results of several `nanoflow bench throughput --ablate --output-json FILE` in one PNG.

python bench/plot_ablation.py 512x512.json 1024x512.json --png ablation.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nanoflow.bench.ablation import draw_ablations


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--png", type=Path, required=True)
    options = parser.parse_args(arguments)
    found = [json.loads(path.read_text()) for path in options.results]
    for path, one in zip(options.results, found, strict=True):
        if not isinstance(one, dict) or one.get("benchmark") != "ablation":
            parser.error(f"{path} is no result of `nanoflow bench throughput --ablate`")
    draw_ablations(found, options.png)
    print(f"{options.png}: {len(found)} results")


if __name__ == "__main__":
    main()
