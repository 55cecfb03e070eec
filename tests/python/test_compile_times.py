"""tests/compile_times.py, which CI runs on the log of the CUDA build."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "compile_times", Path(__file__).parents[1] / "compile_times.py"
)
assert spec is not None and spec.loader is not None
compile_times = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compile_times)

LOG = """# ninja log v5
0\t900\t0\ta.cc.o\t1
100\t70100\t0\tkernels/gemm.cu.o\t2
70100\t80000\t0\tlib.so\t3
0\t160100\t0\ta.cc.o\t4
"""


@pytest.mark.parametrize(("limit", "status"), [("150", 1), ("170", 0)])
def test_slow_files_fail(tmp_path, capsys, limit, status):
    (tmp_path / ".ninja_log").write_text(LOG)
    assert compile_times.main([str(tmp_path), "--limit", limit]) == status
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "  160.1 s  a.cc.o",
        "   70.0 s  kernels/gemm.cu.o",
        "  230.1 s  all 2 files together",
    ]
    assert ("a.cc.o took more than 150 s" in printed.err) == bool(status)
