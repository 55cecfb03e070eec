"""The safetensors reader: what it reads, how much it holds, and what is wrong with a file."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from fake_weights import read
from nanoflow.loading.loader import load_weights
from nanoflow.loading.safetensors import open_safetensors, open_safetensors_dir
from nanoflow.loading.tensors import CHUNK_BYTES
from nanoflow.models import CheckpointWeight, WeightTarget
from tiny_models import write_tiny_llama

MIB = 1 << 20


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_every_tensor_is_what_torch_reads(tmp_path: Path, dtype: str, shard_size: str) -> None:
    write_tiny_llama(tmp_path, dtype=dtype, max_shard_size=shard_size)
    shards = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert (len(shards) > 1) == (shard_size == "20KB")
    expected = {name: tensor for shard in shards for name, tensor in shard.items()}
    tensors = open_safetensors_dir(tmp_path)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read(tensor), expected[name].float().numpy())
        np.testing.assert_array_equal(read(tensor, 300), expected[name].float().numpy())


def test_chunks_are_as_small_as_asked_but_whole_rows(tmp_path: Path) -> None:
    save_file({"t": torch.arange(70.0).reshape(10, 7)}, tmp_path / "t.safetensors")
    tensor = open_safetensors(tmp_path / "t.safetensors")["t"]
    chunks = [(begin, rows.shape) for begin, rows in tensor.chunks(max_bytes=3 * 28)]
    assert chunks == [(0, (3, 7)), (3, (3, 7)), (6, (3, 7)), (9, (1, 7))]
    assert [rows.shape for _, rows in tensor.chunks(max_bytes=1)] == [(1, 7)] * 10


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


CORRUPT = {
    "empty": (b"", "truncated"),
    "short": (b"\x10\0\0", "truncated"),
    "header beyond the file": (struct.pack("<Q", 1 << 40) + b"{}", "truncated"),
    "header is no JSON": (safetensors_bytes(b"{]"), "corrupt safetensors header"),
    "header is no UTF-8": (safetensors_bytes(b"\xff\xfe"), "corrupt safetensors header"),
    "header is no object": (safetensors_bytes(b"[1]"), "no JSON object"),
    "key twice": (safetensors_bytes(b'{"a": 1, "a": 2}'), "appears twice"),
    "entry without offsets": (safetensors_bytes({"a": {"dtype": "F32"}}), "entry of tensor a"),
    "negative shape": (safetensors_bytes({"a": entry(0, 4, [-1])}, bytes(4)), "entry of tensor a"),
    "offsets reversed": (safetensors_bytes({"a": entry(4, 0, [1])}, bytes(4)), "entry of tensor a"),
    "unknown dtype": (safetensors_bytes({"a": entry(0, 4, [1], "F31")}, bytes(4)), "dtype 'F31'"),
    "size and shape disagree": (
        safetensors_bytes({"a": entry(0, 8, [3])}, bytes(8)),
        "needs 12 bytes, its offsets .* hold 8",
    ),
    "outside the file": (
        safetensors_bytes({"a": entry(0, 8, [2])}, bytes(4)),
        "truncated: tensor a ends at byte 8 of the data, the file has 4",
    ),
    "overlap": (
        safetensors_bytes({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
        "tensor b .* overlaps",
    ),
    "gap": (
        safetensors_bytes({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
        "tensor b .* gap",
    ),
    "surplus data": (
        safetensors_bytes({"a": entry(0, 4, [1])}, bytes(6)),
        "take 4 bytes of data, the file has 6",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_file_is_named_with_what_is_wrong(tmp_path: Path, case: str) -> None:
    content, message = CORRUPT[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        open_safetensors(path)
    assert str(path) in str(raised.value)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path, num_layers=1) / "model.safetensors"
    content = path.read_bytes()
    for size in np.linspace(0, len(content) - 1, 60).astype(int):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            open_safetensors(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        open_safetensors_dir(tmp_path)
    write_tiny_llama(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1:3]
    for shard in lost:
        shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{lost[0].name}, {lost[1].name}"):
        open_safetensors_dir(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "corrupt safetensors index"),
        ("{}", "corrupt safetensors index"),
        ('{"weight_map": {"a": 3}}', "corrupt safetensors index"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "plain file names"),
        ('{"weight_map": {"b": "1.safetensors"}}', r"no shard holds: b \(1.safetensors\)"),
        ('{"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}', "another shard: .'a'"),
    ],
)
def test_an_index_must_agree_with_its_shards(tmp_path: Path, index: str, message: str) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        open_safetensors_dir(tmp_path)


def test_weights_of_another_dtype_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.int64)}, tmp_path / "t.safetensors")
    tensor = open_safetensors(tmp_path / "t.safetensors")["a"]
    with pytest.raises(ValueError, match="tensor a has dtype I64, supported are F32, F16, BF16"):
        next(tensor.chunks())


class CountingWeights:
    """Forgets what it is given, and notes the mapped file memory the process holds meanwhile."""

    def __init__(self) -> None:
        self.largest = 0
        self.resident = 0

    def load(self, name: str, array: NDArray[Any], row_begin: int = 0) -> None:
        array.max()  # touches every page
        self.largest = max(self.largest, array.nbytes)
        self.resident = max(self.resident, resident_file_bytes())

    def fill_normal(self, name: str, seed: int, mean: float, std: float) -> None: ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def finish(self) -> None: ...


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("RssFile")]
    return int(line.split()[1]) << 10


def test_loading_holds_one_chunk_of_a_large_file(tmp_path: Path) -> None:
    """768 MiB in two tensors: neither the heap nor the mapped pages grow by more than a chunk."""
    rows = 384 * MIB // 2 // 4096
    header = safetensors_bytes(
        {
            name: entry(n * 384 * MIB, (n + 1) * 384 * MIB, [rows, 4096], "BF16")
            for n, name in enumerate("ab")
        }
    )
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 768 * MIB)  # a hole: takes no disk
    tensors = open_safetensors(path)
    wanted = {
        name: CheckpointWeight(t.shape, (WeightTarget(name, 0, rows),))
        for name, t in tensors.items()
    }
    weights = CountingWeights()
    before = resident_file_bytes()
    tracemalloc.start()
    load_weights(weights, tensors, wanted, lambda name: False, str(path))
    heap = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert weights.largest == CHUNK_BYTES
    assert weights.resident - before < CHUNK_BYTES + 16 * MIB
    assert heap < CHUNK_BYTES
