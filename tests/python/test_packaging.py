"""What an installation of nanoflow holds; a source folder on the path has no such metadata."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest

spec = importlib.util.spec_from_file_location("wheel_check", Path(__file__).parents[1] / "wheel.py")
assert spec is not None and spec.loader is not None
wheel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wheel)

MAX_BYTES = 20 << 20  # of all but the CUDA backend
MAX_CUDA_BYTES = 130 << 20


@pytest.fixture(scope="module")
def distribution() -> metadata.Distribution:
    try:
        return metadata.distribution("nanoflow")
    except metadata.PackageNotFoundError:
        pytest.skip("nanoflow is not installed")


def files(distribution: metadata.Distribution) -> list[metadata.PackagePath]:
    found = distribution.files
    assert found is not None
    return [path for path in found if "__pycache__" not in path.parts]


def test_holds_the_package_the_command_and_its_metadata_only(distribution):
    info = f"nanoflow-{distribution.version}.dist-info"
    tops = {path.parts[0] for path in files(distribution) if path.name != "nanoflow"}
    assert tops == {"nanoflow", info}
    assert "nanoflow" in [path.name for path in files(distribution)]
    names = {path.name for path in files(distribution)}
    assert {"py.typed", "_core.pyi", "libnanoflow_core.so", "LICENSE"} <= names
    assert [name for name in names if name.startswith("_core.") and name.endswith(".so")]


def test_holds_no_sources_tests_or_results(distribution):
    package = [path for path in files(distribution) if path.parts[0] == "nanoflow"]
    tables = [path for path in package if path.parts[:3] == ("nanoflow", "tune", "tables")]
    assert tables
    suffixes = {PurePosixPath(path).suffix for path in package if path not in tables}
    assert suffixes <= {".py", ".pyi", ".so", ".typed", ""}
    assert not [path for path in package if "tests" in path.parts]


def test_is_small(distribution):
    sizes = {path.name: path.locate().stat().st_size for path in files(distribution)}
    assert sizes.pop("libnanoflow_cuda.so", 0) < MAX_CUDA_BYTES
    assert sum(sizes.values()) < MAX_BYTES


def test_torch_is_needed_by_tests_only(distribution):
    required = distribution.requires
    assert required is not None
    plain = [line for line in required if "extra ==" not in line]
    assert not [line for line in plain if line.startswith(("torch", "transformers"))]


def test_installs_the_console_command():
    scripts = metadata.entry_points(group="console_scripts", name="nanoflow")
    if not scripts:
        pytest.skip("nanoflow is not installed")
    (script,) = scripts
    assert script.value == "nanoflow.cli:main"
    assert callable(script.load())


AUDIT = {
    "overall_tag": "manylinux_2_35_x86_64",
    "external_libs": {},
    "unsupported_isa": False,
}


@pytest.mark.parametrize(
    ("audit", "megabytes", "message"),
    [
        ({}, 3.0, None),
        ({}, 20.4, "it has 20.4 MB, more than 20"),
        ({"external_libs": {"libcuda.so.1": None}}, 3.0, "does not promise: libcuda.so.1"),
        ({"overall_tag": "linux_x86_64"}, 3.0, "it fits no manylinux tag, only linux_x86_64"),
        ({"unsupported_isa": True}, 3.0, "its code needs instructions"),
    ],
)
def test_what_a_wheel_must_not_be(audit, megabytes, message):
    found = wheel.findings(AUDIT | audit, megabytes, 20)
    assert (message is None and not found) or (len(found) == 1 and message in found[0])
