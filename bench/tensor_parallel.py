"""Tensor parallelism as the NanoFlow paper measures it: three schedules, its fixed lengths.

    python bench/tensor_parallel.py --ranks 2 --output-dir bench/results
    python bench/tensor_parallel.py --simulate 8 --shape qwen2-72b --output-dir bench/results

Each workload is a process of `nanoflow bench throughput --ablate` with random weights: sequential,
the nano-batches of the schedule without overlap, and the schedule. With --simulate one GPU runs its
part of a model that N would share, and copies its own data where collectives would be.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from shapes import SHAPES, write_model

WORKLOADS = ("512x512", "1024x512", "512x1024")


def main() -> int:
    """The number of workloads that failed."""
    options = parse_arguments()
    failed = 0
    for workload in options.workload:
        print(f"== {options.shape}, {workload}", flush=True)
        failed += subprocess.run(command(options, workload)).returncode != 0
    return failed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--ranks", type=int, help="GPUs that share the model")
    ranks.add_argument("--simulate", type=int, metavar="N", help="one rank of N without the others")
    add("--shape", choices=sorted(SHAPES), default="llama-3-70b")
    add("--workload", nargs="+", default=list(WORKLOADS), metavar="INxOUT")
    add("--schedule", default="tp-overlap", help="a name or a JSON file")
    add("--max-num-seqs", type=int, default=512)
    add("--max-num-batched-tokens", type=int, default=2048)
    add("--steady-seconds", type=float, default=20)
    add("--device", default="cuda")
    add("--output-dir", type=Path, required=True)
    add("--commit", help="what the results say was measured (default: as git says)")
    return parser.parse_args()


def command(options: argparse.Namespace, workload: str) -> list[str]:
    """Raises ValueError on a workload that is not INxOUT."""
    input_len, output_len = (int(length) for length in workload.split("x"))
    model = write_model(options.output_dir / "models", options.shape)
    name = f"tp{options.ranks}" if options.ranks else f"tp{options.simulate}-simulated"
    result = options.output_dir / f"{options.shape}-{name}-{workload}-ablation.json"
    flags = {
        "--model": model,
        "--load-format": "dummy",
        "--temperature": 0,
        "--device": options.device,
        "--schedule": options.schedule,
        "--max-num-seqs": options.max_num_seqs,
        "--max-num-batched-tokens": options.max_num_batched_tokens,
        "--input-len": input_len,
        "--output-len": output_len,
        "--max-model-len": input_len + output_len + 64,
        "--steady-seconds": options.steady_seconds,
        "--output-json": result,
    }
    if options.ranks:
        flags["--tensor-parallel-size"] = options.ranks
    else:
        flags["--simulate-tensor-parallel"] = options.simulate
    if options.commit:
        flags["--commit"] = options.commit
    switches = ["--skip-tokenizer-init", "--disable-detokenize", "--no-enable-prefix-caching"]
    switches += ["--ablate", "--steady-start"]
    pairs = [str(part) for pair in flags.items() for part in pair]
    return [sys.executable, "-m", "nanoflow.bench", "throughput", *pairs, *switches]


if __name__ == "__main__":
    sys.exit(main())
