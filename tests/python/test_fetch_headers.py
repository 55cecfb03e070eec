"""third_party/fetch_headers.py on made-up wheels; the real one is fetched by hand."""

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "third_party" / "fetch_headers.py"

HEADERS = {
    "flashinfer/data/include/flashinfer/page.cuh": b"page",
    "flashinfer/data/cutlass/include/cutlass/cutlass.h": b"cutlass",
    "flashinfer/data/cutlass/tools/util/include/cutlass/util/x.h": b"util",
}
OTHERS = {"flashinfer/__init__.py": b"import torch", "flashinfer/data/csrc/norm.cu": b"norm"}


@pytest.fixture(scope="module")
def fetch_headers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_headers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_wheel(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_unpacks_the_headers_and_nothing_else(fetch_headers, tmp_path):
    sha256 = make_wheel(tmp_path / "x.whl", HEADERS | OTHERS)
    folder = tmp_path / "headers"
    assert fetch_headers.unpack(tmp_path / "x.whl", folder, sha256) == 3
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "SOURCE",
        "flashinfer/include/flashinfer/page.cuh",
        "cutlass/include/cutlass/cutlass.h",
        "cutlass/tools/util/include/cutlass/util/x.h",
    }
    assert (folder / "flashinfer/include/flashinfer/page.cuh").read_bytes() == b"page"
    assert fetch_headers.is_fetched(folder, sha256)
    assert not fetch_headers.is_fetched(folder, "another wheel")
    assert {path.name for path in tmp_path.iterdir()} == {"x.whl", "headers"}


def test_replaces_an_older_unpacking(fetch_headers, tmp_path):
    folder = tmp_path / "headers"
    old = {"flashinfer/data/include/flashinfer/gone.cuh": b"old", **HEADERS}
    fetch_headers.unpack(tmp_path / "a.whl", folder, make_wheel(tmp_path / "a.whl", old))
    fetch_headers.unpack(tmp_path / "b.whl", folder, make_wheel(tmp_path / "b.whl", HEADERS))
    assert not (folder / "flashinfer/include/flashinfer/gone.cuh").exists()


def test_rejects_another_wheel(fetch_headers, tmp_path):
    sha256 = make_wheel(tmp_path / "x.whl", HEADERS)
    with pytest.raises(fetch_headers.HeaderError, match=f"sha256 is {sha256}, expected {'0' * 64}"):
        fetch_headers.unpack(tmp_path / "x.whl", tmp_path / "headers", "0" * 64)
    assert not (tmp_path / "headers").exists()


def test_rejects_a_wheel_without_cutlass(fetch_headers, tmp_path):
    files = {name: content for name, content in HEADERS.items() if "cutlass/include" not in name}
    sha256 = make_wheel(tmp_path / "x.whl", files)
    with pytest.raises(fetch_headers.HeaderError, match=r"no files for cutlass/include$"):
        fetch_headers.unpack(tmp_path / "x.whl", tmp_path / "headers", sha256)
    assert not (tmp_path / "headers").exists()


def test_rejects_paths_that_leave_the_folder(fetch_headers, tmp_path):
    sha256 = make_wheel(tmp_path / "x.whl", {"flashinfer/data/include/../../../evil.h": b""})
    with pytest.raises(fetch_headers.HeaderError, match="unsafe path"):
        fetch_headers.unpack(tmp_path / "x.whl", tmp_path / "headers", sha256)


def test_command_leaves_foreign_folders_alone(fetch_headers, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit):
        fetch_headers.main([str(tmp_path / "mine"), "--wheel", "x.whl"])
    assert "was not made by this command" in capsys.readouterr().err


def test_command_says_what_is_wrong(fetch_headers, tmp_path, capsys):
    make_wheel(tmp_path / "x.whl", HEADERS)
    code = fetch_headers.main([str(tmp_path / "headers"), "--wheel", str(tmp_path / "x.whl")])
    assert code == 1
    assert "is not the pinned flashinfer-python==0.6.9" in capsys.readouterr().err
