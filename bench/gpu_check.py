"""What one runs on a fresh GPU machine: tests and benchmarks in order, with one JSON of everything.

    python bench/gpu_check.py --output-dir check                       # all sections
    python bench/gpu_check.py --output-dir check --only throughput     # one of them

Every section ends within --section-seconds. What fails does not keep the rest from running, but the
exit code is 1. What ran before in the same folder stays in the JSON, if it was the same commit on
the same device. nanoflow must be importable; --build-dir names a CMake build folder with the C++
tests and the kernels' library, which are left out without.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from nanoflow import _core
from nanoflow.bench import environment
from shapes import write_model

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
TAIL_LINES = 40  # of what a command prints, kept in the JSON
MODEL = "llama-3.1-8b"
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda")
SANITIZED = ("kernels", "gemm", "experts", "attention", "sampling", "cuda_engine", "cuda_sampling")
WORKLOADS = ((512, 512), (512, 1024), (1024, 512))


@dataclass(frozen=True)
class Step:
    """A command, and the JSON files that it leaves."""

    command: list[str]
    results: str | None = None  # a pattern in the output folder


def tests(options: argparse.Namespace) -> list[Step]:
    steps = [Step([*PYTEST, str(ROOT / "tests" / "python")])]
    if options.build_dir is not None:
        ctest = ["ctest", "--test-dir", str(options.build_dir), "--output-on-failure"]
        steps.append(Step([*ctest, "-R", "cuda"]))
    return steps


def sanitizer(options: argparse.Namespace) -> list[Step]:
    """Small tests of every op and of whole steps. racecheck ends a process that makes a partition
    of the SMs."""
    files = [str(ROOT / "tests" / "python" / f"test_{name}.py") for name in SANITIZED]
    steps = []
    for tool, selected in (("memcheck", "cuda"), ("racecheck", "cuda and not partitioned")):
        checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        steps.append(Step([*checked, *PYTEST[:-1], selected, "-m", "sanitizer", *files]))
    return steps


def commit_flag(options: argparse.Namespace) -> list[str]:
    """For scripts that ask git themselves where nothing is said."""
    return ["--commit", options.commit] if options.commit else []


def kernels(options: argparse.Namespace) -> list[Step]:
    libraries = sorted((options.build_dir or ROOT / "build").rglob("libnanoflow_cuda_kernels.so"))
    if not libraries:
        print("kernels: there is no libnanoflow_cuda_kernels.so below --build-dir")
        return []
    library = str(libraries[0])
    steps = [Step([sys.executable, str(BENCH / "cuda" / "check.py"), library])]
    for name in ("gemm", "attention"):
        out = f"cuda-{name}.json"
        script = str(BENCH / "cuda" / f"{name}.py")
        command = [sys.executable, script, library, str(options.output_dir / out)]
        steps.append(Step([*command, options.commit or str(environment.commit())], out))
    script, out = str(BENCH / "cuda" / "experts.py"), "cuda-experts.json"
    command = [sys.executable, script, str(options.output_dir / out)]
    return [*steps, Step([*command, options.commit or str(environment.commit())], out)]


def throughput(options: argparse.Namespace) -> list[Step]:
    model = write_model(options.output_dir / "models", MODEL)
    command = [sys.executable, "-m", "nanoflow.bench", "throughput", "--model", str(model)]
    command += ["--load-format", "dummy", "--skip-tokenizer-init", "--disable-detokenize"]
    command += ["--temperature", "0", "--device", options.device, "--max-num-seqs", "1024"]
    command += ["--max-num-batched-tokens", "2048", "--no-enable-prefix-caching", "--steady-start"]
    command += ["--result-dir", str(options.output_dir)]
    command += commit_flag(options)
    workloads = [
        ["--input-len", str(i), "--output-len", str(o), "--max-model-len", str(i + o + 64)]
        for i, o in WORKLOADS
    ]
    if options.trace is not None:
        trace = ["--dataset-name", "trace", "--dataset-path", str(options.trace)]
        trace += ["--max-model-len", "4096", "--num-prompts", "6000", "--steady-seconds", "40"]
        workloads.append(trace)
    names = [f"{i}x{o}" for i, o in WORKLOADS] + ([options.trace.stem] if options.trace else [])
    return [
        Step([*command, *workload, "--schedule", schedule], f"*/{name}-{Path(schedule).stem}.json")
        for schedule in options.schedule
        for workload, name in zip(workloads, names, strict=True)
    ]


def tune(options: argparse.Namespace) -> list[Step]:
    """Op times as the package has them, and the fastest schedule."""
    model = write_model(options.output_dir / "models", MODEL)
    command = [sys.executable, "-m", "nanoflow", "tune", "--model", str(model)]
    command += ["--load-format", "dummy", "--device", options.device]
    command += ["--output", str(options.output_dir / "tuned-schedule.json")]
    return [Step([*command, "--table", str(options.output_dir / "tuned.json")], "tuned*.json")]


def soak(options: argparse.Namespace) -> list[Step]:
    command = [sys.executable, str(BENCH / "soak.py"), "--device", options.device]
    command += commit_flag(options)
    out = "soak.json"
    return [Step([*command, "--output-json", str(options.output_dir / out)], out)]


def start(options: argparse.Namespace) -> list[Step]:
    command = [sys.executable, str(BENCH / "cold_start.py"), "--device", options.device]
    command += ["--shape", MODEL, "--runs", "2"]
    command += commit_flag(options)
    out = "cold_start.json"
    return [Step([*command, "--output-json", str(options.output_dir / out)], out)]


SECTIONS: Mapping[str, Callable[[argparse.Namespace], list[Step]]] = {
    "tests": tests,
    "sanitizer": sanitizer,
    "kernels": kernels,
    "throughput": throughput,
    "tune": tune,
    "soak": soak,
    "start": start,
}


def run_section(steps: Sequence[Step], output_dir: Path, seconds: float) -> list[dict[str, Any]]:
    """Runs what fits into so many seconds; what is still running then is killed."""
    end = perf_counter() + seconds
    done = []
    for step in steps:
        begin = perf_counter()
        code, output = run_command(step.command, end - begin)
        found = {}
        for path in sorted(output_dir.glob(step.results)) if step.results and code == 0 else ():
            found[path.relative_to(output_dir).as_posix()] = json.loads(path.read_text())
        lines = output.splitlines()
        print("\n".join(lines[-TAIL_LINES:]), flush=True)
        done.append(
            {
                "command": " ".join(map(environment.without_folders, step.command)),
                "returncode": code,
                "seconds": perf_counter() - begin,
                "output_tail": lines[-TAIL_LINES:],
                "results": found,
            }
        )
    return done


def run_command(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Its exit code and what it prints; no code when it did not end in so many seconds."""
    if seconds <= 0:
        return None, "not started: the section's time is over"
    print(f"--- {' '.join(command)}", flush=True)
    try:
        ended = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, text=True
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return None, output.decode(errors="replace") if isinstance(output, bytes) else output
    except OSError as error:
        return None, str(error)
    return ended.returncode, ended.stdout


def earlier_sections(path: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Of the same commit on the same device, as the file has them."""
    if not path.exists():
        return {}
    earlier: dict[str, Any] = json.loads(path.read_text())
    is_same = all(earlier[name] == report[name] for name in ("device", "commit", "versions"))
    return earlier["sections"] if is_same else {}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--build-dir", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--schedule", nargs="+", default=["sequential"])
    parser.add_argument("--trace", type=Path, help="CSV of input and output lengths")
    parser.add_argument("--section-seconds", type=float, default=600, help="default: 600")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    options = parser.parse_args(arguments)
    options.output_dir = options.output_dir.resolve()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "gpu_check.json"
    report: dict[str, Any] = {
        "device": _core.Backend(options.device).description,
        "commit": options.commit or environment.commit(),
        "versions": environment.versions(),
    }
    report["sections"] = earlier_sections(path, report)
    failed = 0
    for name in options.only:
        print(f"=== {name}", flush=True)
        steps = SECTIONS[name](options)
        done = run_section(steps, options.output_dir, options.section_seconds)
        failed += sum(step["returncode"] != 0 for step in done)
        report["sections"][name] = done
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{failed} commands failed; everything is in {path}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
