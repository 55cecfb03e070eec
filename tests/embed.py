"""Build the program of tests/cpp/embed against an installed nanoflow, and compare what it generates
from an exported model with what Python generates.

Usage: python tests/embed.py BUILD_DIR [--device cuda]

BUILD_DIR is a folder where CMake has built nanoflow, for that device. Needs nanoflow in Python,
CMake and Ninja.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import installed

from nanoflow import LLM, SamplingParams
from nanoflow.cli import main as nanoflow

PROJECT = Path(__file__).parent / "cpp" / "embed"
PROMPTS = [[5, 6, 7], [9], [*range(20, 110)]]  # the last takes two pages
STEPS = 40
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
MODELS = {  # what each has beside the entries of installed.CONFIG
    "LlamaForCausalLM": {"model_type": "llama"},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "head_dim": 64},
    "MixtralForCausalLM": {"model_type": "mixtral", **EXPERTS},
}
LLM_ARGUMENTS = {"load_format": "dummy", "skip_tokenizer_init": True, "schedule": "sequential"}


def generate_in_python(model: Path, device: str) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
    with LLM(model, device=device, **LLM_ARGUMENTS) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False
        )
    return [output.outputs[0].token_ids for output in outputs]


def build_program(build_dir: Path, scratch: Path) -> Path:
    """Installs nanoflow below `scratch` and builds the consumer's project against it."""
    prefix, build = scratch / "prefix", scratch / "build"
    configure = ["cmake", "-G", "Ninja", "-S", PROJECT, "-B", build]
    configure += [f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"]
    for command in (
        ["cmake", "--install", build_dir, "--prefix", prefix],
        configure,
        ["cmake", "--build", build],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return build / "generate"


def run_program(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [program, *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("build_dir", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        program = build_program(options.build_dir, scratch)
        for name, config in MODELS.items():
            model = installed.write_model(scratch / name, architectures=[name], **config)
            check_model(program, model, scratch / f"exported-{name}", options.device)
        failed = run_program(program, options.device, scratch, STEPS, "5")
        if failed.returncode != 1 or "`nanoflow export-spec MODEL FOLDER`" not in failed.stderr:
            raise SystemExit(f"without a model: status {failed.returncode}, {failed.stderr!r}")


def check_model(program: Path, model: Path, exported: Path, device: str) -> None:
    if nanoflow(["export-spec", str(model), str(exported), "--load-format", "dummy"]):
        raise SystemExit(f"{model.name} could not be exported")
    prompts = [",".join(map(str, ids)) for ids in PROMPTS]
    done = run_program(program, device, exported, STEPS, *prompts)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    expected = generate_in_python(model, device)
    if found != expected:
        raise SystemExit(f"{model.name}: C++ generated {found}, Python {expected}")
    print(f"{model.name}: C++ and Python generate the same {sum(map(len, found))} tokens")


if __name__ == "__main__":
    sys.exit(main())
