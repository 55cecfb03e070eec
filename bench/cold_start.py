"""From process start to the first token of SmolLM2-135M-Instruct, model file and libraries cached.

Every run is a fresh process that imports nanoflow, loads the model, and answers a chat prompt with
one token. The first run, which fills the caches, is not counted.

    python bench/cold_start.py --output-json bench/results/cpu/cold_start.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from nanoflow.bench import environment
from nanoflow.bench.default_model import default_model

CHILD = """
import json, sys
from time import perf_counter
start = perf_counter()
from nanoflow import LLM, SamplingParams
imported = perf_counter()
llm = LLM(sys.argv[1])
loaded = perf_counter()
messages = [{"role": "user", "content": "What is the capital of France?"}]
output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)[0]
assert len(output.outputs[0].token_ids) == 1
done = perf_counter()
phases = {"import": imported - start, "load": loaded - imported, "first_token": done - loaded}
print(json.dumps(phases), flush=True)
"""


def start_once(model: Path) -> dict[str, float]:
    """Seconds of each phase, and in all from the start of the process to its first token."""
    begin = perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(model)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        total = perf_counter() - begin
    if child.returncode != 0:
        raise RuntimeError(f"the process ended with {child.returncode}")
    phases: dict[str, float] = json.loads(line)
    return {"interpreter": total - sum(phases.values()), **phases, "total": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    model = default_model()
    start_once(model)
    runs = [start_once(model) for _ in range(options.runs)]
    medians = {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}
    for phase, seconds in medians.items():
        print(f"{phase:12} {seconds:6.2f} s")
    if options.output_json is None:
        return
    result = {
        "benchmark": "cold_start",
        "command": environment.command_line(),
        "commit": environment.commit(),
        "versions": environment.versions(),
        "device": environment.cpu_model(),
        "model_id": "SmolLM2-135M-Instruct",
        "warm_up": "one run, not counted",
        "median_seconds": medians,
        "runs": runs,
    }
    options.output_json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
