"""The script for a fresh GPU machine, on made-up sections."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import gpu_check
from gpu_check import Step


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_goes_on_after_a_failure_and_tells_it(tmp_path, monkeypatch, capsys):
    result = f"open({str(tmp_path / 'a.json')!r}, 'w').write('[1]')"
    sections = {
        "first": lambda options: [Step(python("print('bad'); exit(3)"), "a.json")],
        "second": lambda options: [Step(python(result), "a.json"), Step(["/no/such/program"])],
    }
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    flags = ["--output-dir", str(tmp_path), "--commit", "abc", "--device", "cpu"]
    assert gpu_check.main(flags) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    [bad], [good, missing] = report["sections"]["first"], report["sections"]["second"]
    assert (bad["returncode"], bad["output_tail"], bad["results"]) == (3, ["bad"], {})
    assert (good["returncode"], good["results"]) == (0, {"a.json": [1]})
    assert missing["returncode"] is None and "No such file" in missing["output_tail"][0]
    assert report["commit"] == "abc" and report["device"].startswith("cpu")
    assert "2 commands failed" in capsys.readouterr().out


def test_a_section_ends_in_its_time(tmp_path):
    slow = python("import time; print('begun', flush=True); time.sleep(60)")
    first, second = gpu_check.run_section([Step(slow), Step(slow)], tmp_path, 2.0)
    assert first["returncode"] is None and first["output_tail"] == ["begun"]
    assert second["returncode"] is None and second["seconds"] < 1


def test_sections_can_be_chosen(tmp_path, monkeypatch):
    ran: list[str] = []
    sections = {name: lambda options, name=name: ran.append(name) or [] for name in "abc"}
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    flags = ["--output-dir", str(tmp_path), "--device", "cpu", "--only", "c", "a"]
    assert gpu_check.main(flags) == 0
    assert ran == ["c", "a"]


@pytest.mark.parametrize(("commit", "expected"), [("abc", ["a", "b"]), ("abd", ["b"])])
def test_sections_of_one_commit_gather_in_one_file(tmp_path, monkeypatch, commit, expected):
    sections = {name: lambda options: [Step(python("print('good')"))] for name in "ab"}
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    flags = ["--output-dir", str(tmp_path), "--device", "cpu"]
    assert gpu_check.main([*flags, "--commit", "abc", "--only", "a"]) == 0
    assert gpu_check.main([*flags, "--commit", commit, "--only", "b"]) == 0
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert (report["commit"], list(report["sections"])) == (commit, expected)
    assert report["sections"]["b"][0]["output_tail"] == ["good"]


@pytest.mark.parametrize("name", gpu_check.SECTIONS)
def test_commands_name_files_that_exist(tmp_path, name):
    (tmp_path / "libnanoflow_cuda_kernels.so").touch()
    options = gpu_check.argparse.Namespace(
        output_dir=tmp_path,
        build_dir=tmp_path,
        device="cuda",
        schedule=["sequential"],
        trace=Path("chats.csv"),
        commit="abc",
    )
    steps = gpu_check.SECTIONS[name](options)
    assert steps
    for step in steps:
        outputs = (str(tmp_path / "cuda-"), str(tmp_path / "soak"), str(tmp_path / "cold"))
        outputs += (str(tmp_path / "tuned"),)
        paths = [word for word in step.command if word.startswith("/")]
        assert [p for p in paths if not p.startswith(outputs) and not Path(p).exists()] == []


def test_the_time_of_a_section_can_be_chosen(tmp_path, monkeypatch):
    slow = [Step(python("import time; time.sleep(60)"))]
    monkeypatch.setattr(gpu_check, "SECTIONS", {"slow": lambda options: slow})
    flags = ["--output-dir", str(tmp_path), "--device", "cpu", "--section-seconds", "0.5"]
    assert gpu_check.main(flags) == 1
    [step] = json.loads((tmp_path / "gpu_check.json").read_text())["sections"]["slow"]
    assert step["returncode"] is None and step["seconds"] < 30
