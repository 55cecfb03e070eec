"""`nanoflow export-spec`: what it writes for C++. tests/embed.py reads it there."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import pytest

from nanoflow import _core
from nanoflow.cli import main
from nanoflow.loading import open_checkpoint
from tiny_models import write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


def export(*arguments: str | Path) -> int:
    return main(["export-spec", *map(str, arguments)])


def lines_of(folder: Path) -> list[list[str]]:
    return [line.split(" ") for line in (folder / "model.txt").read_text().splitlines()]


def test_every_field_of_the_spec_is_written(model, tmp_path, capsys):
    assert export(model, tmp_path, "--dtype", "float32") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}: 2 layers, float32, ")
    head, *lines = lines_of(tmp_path)
    assert head == ["nanoflow-model", "1"]
    fields = {word: values for word, *values in lines if word != "tensor"}
    expected = open_checkpoint(model).model.spec_arguments("float32")
    assert fields.keys() == expected.keys()
    assert fields["hidden_size"] == [str(expected["hidden_size"])]
    written = np.array(fields["rope_inv_freq"], np.float32)
    np.testing.assert_array_equal(written, np.float32(expected["rope_inv_freq"]))


def test_tensors_lie_where_the_text_says(model, tmp_path):
    assert export(model, tmp_path) == 0
    checkpoint = open_checkpoint(model)
    stored = {
        tensor.name: np.concatenate([rows.copy() for _, rows in tensor.chunks()])
        for tensor in checkpoint.tensors().values()
    }
    dtype = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
    data = (tmp_path / "weights.bin").read_bytes()
    found, end = {}, 0
    for word, *rest in lines_of(tmp_path):
        if word != "tensor":
            continue
        name, kind, offset, *extents = rest
        shape = [int(extent) for extent in extents]
        assert int(offset) == end
        array = np.frombuffer(data, dtype[kind], prod(shape), end).reshape(shape)
        found[name], end = array, end + array.nbytes
    assert end == len(data)
    spec = _core.ModelSpec(**checkpoint.model.spec_arguments(checkpoint.resolve_dtype()))
    assert found.keys() == _core.Weights(spec, _core.Backend("cpu")).shapes().keys()
    np.testing.assert_array_equal(found["embed"], stored["model.embed_tokens.weight"])
    attention = "model.layers.1.self_attn."
    qkv = [stored[f"{attention}{name}_proj.weight"] for name in "qkv"]
    np.testing.assert_array_equal(found["layers.1.qkv"], np.concatenate(qkv))


def test_what_cannot_be_exported_is_told(model, tmp_path, capsys):
    occupied = tmp_path / "file"
    occupied.write_text("in the way")
    for arguments, message in (
        ((tmp_path / "none", tmp_path), f"model path {tmp_path}/none does not exist"),
        ((model, occupied), f"cannot make the folder {occupied}"),
        ((model, tmp_path / "out", "--dtype", "int8"), "dtype 'int8' is not supported"),
    ):
        assert export(*arguments) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
