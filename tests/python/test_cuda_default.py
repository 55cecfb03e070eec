"""When a plain `pip install .` builds the CUDA backend: where nvcc and a GPU are both present."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "csrc/kernels/cuda/default.cmake"

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


def write_program(path: Path, status: int) -> None:
    path.write_text(f"#!/bin/sh\nexit {status}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("status", "default"), [(0, "ON"), (9, "OFF")])
def test_nvcc_and_a_gpu_make_the_default(tmp_path: Path, status: int, default: str) -> None:
    """nvidia-smi fails where it is installed but finds no GPU."""
    (tmp_path / "bin").mkdir()
    write_program(tmp_path / "bin/nvcc", 0)
    write_program(tmp_path / "bin/nvidia-smi", status)
    script = tmp_path / "print.cmake"
    found = "nvcc=${NANOFLOW_NVCC} default=${NANOFLOW_CUDA_DEFAULT}"
    script.write_text(f'include("{SCRIPT}")\nmessage("{found}")')
    environment = {
        **os.environ,
        "CUDA_HOME": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["cmake", "-P", str(script)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == f"nvcc={tmp_path / 'bin/nvcc'} default={default}"
