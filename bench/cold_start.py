"""From process start to the first token, model file and libraries cached.

Every run is a fresh process that imports nanoflow, loads the model (SmolLM2-135M-Instruct unless
told otherwise), and answers a prompt with one token. The first run, which fills the caches, is not
counted.

    python bench/cold_start.py --output-json bench/results/cpu/cold_start.json
    python bench/cold_start.py --shape llama-3.1-8b --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from nanoflow.bench import environment
from nanoflow.bench.default_model import default_model
from shapes import SHAPES, write_model

MAX_MODEL_LEN = 2048  # of random weights
CHILD = """
import json, sys
from dataclasses import asdict
from time import perf_counter
start = perf_counter()
from nanoflow import LLM, SamplingParams
imported = perf_counter()
arguments = json.loads(sys.argv[1])
llm = LLM(**arguments)
loaded = perf_counter()
params = SamplingParams(temperature=0, max_tokens=1)
if arguments.get("skip_tokenizer_init"):
    output = llm.generate({"prompt_token_ids": [7] * 30}, params, use_tqdm=False)[0]
else:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    output = llm.chat(messages, params, use_tqdm=False)[0]
assert len(output.outputs[0].token_ids) == 1
done = perf_counter()
phases = {"import": imported - start, **llm.start_seconds, "first_token": done - loaded}
print(json.dumps([phases, llm.device_description, asdict(llm.memory)]), flush=True)
"""


def start_once(arguments: dict[str, Any]) -> tuple[dict[str, float], str, dict[str, Any]]:
    """Seconds of each phase, and in all from the start of the process to its first token; what the
    device says of itself; and how its memory was shared out.
    """
    begin = perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(arguments)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        total = perf_counter() - begin
    if child.returncode != 0:
        raise RuntimeError(f"the process ended with {child.returncode}")
    phases, device, memory = json.loads(line)
    return {"interpreter": total - sum(phases.values()), **phases, "total": total}, device, memory


def llm_arguments(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = {"device": options.device}
    if options.shape is None:
        return arguments | {"model": str(default_model())}
    model = write_model(scratch, options.shape)
    arguments |= {"model": str(model), "load_format": "dummy", "skip_tokenizer_init": True}
    return arguments | {"max_model_len": MAX_MODEL_LEN}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape", choices=SHAPES, help="a model of random weights")
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        of_llm = llm_arguments(options, Path(scratch))
        start_once(of_llm)
        measured = [start_once(of_llm) for _ in range(options.runs)]
    runs = [run for run, _, _ in measured]
    _, device, memory = measured[-1]
    medians = {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}
    for phase, seconds in medians.items():
        print(f"{phase:12} {seconds:6.2f} s")
    if options.output_json is None:
        return
    result = {
        "benchmark": "cold_start",
        **environment.origin(options.commit),
        "device": environment.cpu_model() if device.startswith("cpu") else device,
        "model_id": options.shape or "SmolLM2-135M-Instruct",
        "warm_up": "one run, not counted",
        "median_seconds": medians,
        "memory": memory,
        "runs": runs,
    }
    options.output_json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
