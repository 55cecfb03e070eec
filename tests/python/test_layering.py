"""Who may include or import whom."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "python" / "nanoflow"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cc", ".cu", ".cuh"))
MODULES = sorted(PACKAGE.rglob("*.py"))

# What a folder may include of ours, beside itself. A backend is opened by name, never included.
ALLOWED = {
    "core": (),
    "kernels": ("core",),
    "kernels/cpu": ("core", "kernels"),
    "kernels/cuda": ("core", "kernels"),
    "model": ("core", "kernels"),
    "pipeline": ("core", "kernels", "model"),
    "bindings": ("core", "kernels", "model", "pipeline"),
    ".": ("core", "kernels", "model", "pipeline"),  # nanoflow.h
}
DEVICE_HEADER = re.compile(r"cuda|cublas|nccl|cutlass|cute/|flashinfer|cub/|thrust/")
PYTHON_HEADER = re.compile(r"pybind11|Python\.h|numpy")


def folder_of(path: Path) -> str:
    return path.parent.relative_to(CSRC).as_posix()


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_includes_go_down_only(path: Path) -> None:
    folder = folder_of(path)
    for header in includes(path):
        if (CSRC / header).exists():
            theirs = Path(header).parent.as_posix()
            assert theirs in (folder, *ALLOWED[folder]), f"{folder} includes {header}"
        elif folder != "kernels/cuda":
            assert not DEVICE_HEADER.match(header), f"{header} outside kernels/cuda"
        if folder != "bindings":
            assert not PYTHON_HEADER.match(header), f"{header} outside bindings"
    if folder != "kernels/cuda":
        assert not re.search(r"^\s*#\s*if.*CUDA", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_keep_their_place(path: Path) -> None:
    found = set(imports(path))
    name = path.relative_to(PACKAGE).as_posix()
    if name != "bench/gpu_profile.py":  # where torch is one way to the GPU's own records
        assert not any(module.split(".")[0] in ("torch", "transformers") for module in found)
    if name.startswith("scheduler/"):
        forbidden = [
            "nanoflow.loading",
            "nanoflow.models",
            "nanoflow.front",
            "nanoflow.llm",
            "nanoflow._core",
        ]
    elif name.startswith(("models/", "loading/")):
        forbidden = [
            "nanoflow.scheduler",
            "nanoflow.front",
            "nanoflow.llm",
            "nanoflow.request",
            "nanoflow._core",
        ]
    else:
        forbidden = []
    if name in ("scheduler/policy.py", "scheduler/pages.py", "scheduler/deal.py"):
        forbidden += ["threading", "nanoflow.errors", "nanoflow.scheduler.loop"]
    for module in found:
        assert not module.startswith(tuple(forbidden)), f"{name} imports {module}"


def test_models_do_not_import_loading() -> None:
    for path in (PACKAGE / "models").glob("*.py"):
        assert not any(module.startswith("nanoflow.loading") for module in imports(path))
