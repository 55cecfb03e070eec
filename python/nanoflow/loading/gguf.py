"""Reader of GGUF files of llama and gemma3: config, metadata, and dequantised tensors.

The `gguf` package parses the file and dequantises. Converters to GGUF reorder the rows of q and k
of a Llama for rotations of neighbouring pairs; here they are put back into the halves that Hugging
Face models rotate. Of Gemma's norms they store 1 + weight.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from nanoflow.loading.gguf_config import hf_config
from nanoflow.loading.tensors import CHUNK_BYTES, release_pages, row_ranges

_TOP_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)
_LAYER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm.weight": "input_layernorm.weight",
        "attn_q.weight": "self_attn.q_proj.weight",
        "attn_k.weight": "self_attn.k_proj.weight",
        "attn_v.weight": "self_attn.v_proj.weight",
        "attn_output.weight": "self_attn.o_proj.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn_gate.weight": "mlp.gate_proj.weight",
        "ffn_up.weight": "mlp.up_proj.weight",
        "ffn_down.weight": "mlp.down_proj.weight",
    }
)
_GEMMA3_LAYER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **_LAYER_NAMES,
        "attn_q_norm.weight": "self_attn.q_norm.weight",
        "attn_k_norm.weight": "self_attn.k_norm.weight",
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "ffn_norm.weight": "pre_feedforward_layernorm.weight",
        "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    }
)
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(.+)")
_ROPE_FACTORS = "rope_freqs.weight"
# Stored kinds that are handed on as they are; uint16 holds bfloat16 bits.
_NATIVE: Mapping[gguf.GGMLQuantizationType, Any] = MappingProxyType(
    {
        gguf.GGMLQuantizationType.F32: np.float32,
        gguf.GGMLQuantizationType.F16: np.float16,
        gguf.GGMLQuantizationType.BF16: np.uint16,
    }
)


_MAX_THREADS = min(8, os.cpu_count() or 1)
_THREAD_BYTES = 1 << 20  # stored bytes that are worth a thread


class _CheckedBytes:
    """The bytes of a file; slicing beyond their end raises instead of returning less."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data

    def __getitem__(self, item: slice) -> NDArray[np.uint8]:
        if item.stop > self.data.size:
            raise ValueError(
                f"truncated: {item.stop} bytes are needed, the file has {self.data.size}"
            )
        return self.data[item]


class _Reader(gguf.GGUFReader):
    """GGUFReader with checked reads, on a plain array: slicing a memmap is three times slower."""

    mapping: mmap.mmap
    _checked: _CheckedBytes

    @property
    def data(self) -> Any:
        return self._checked

    @data.setter
    def data(self, value: np.memmap[Any, Any]) -> None:
        assert isinstance(value.base, mmap.mmap)
        self.mapping = value.base
        self._checked = _CheckedBytes(value.view(np.ndarray))


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file under its Hugging Face name; see CheckpointTensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    stored: gguf.ReaderTensor
    heads: int  # number of heads whose rows are put back into halves; 0: rows stay as they are
    mapping: mmap.mmap
    is_offset: bool = False  # 1 more is stored than the model has

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, NDArray[Any]]]:
        """See CheckpointTensor. Raises ValueError on a quantisation that `gguf` cannot undo."""
        if len(self.shape) == 1:
            values = self._decode(self.stored.data)
            yield 0, values - np.float32(1) if self.is_offset else values
            self._release(0, self.shape[0])
            return
        order = _half_split_order(self.shape[0], self.heads) if self.heads else None
        for begin, end in row_ranges(self.shape[0], 4 * prod(self.shape[1:]), max_bytes):
            data = self.stored.data
            yield begin, self._decode(data[begin:end] if order is None else data[order[begin:end]])
            self._release(begin, end)

    def _decode(self, rows: NDArray[Any]) -> NDArray[Any]:
        kind = self.stored.tensor_type
        if kind in _NATIVE:
            return np.require(rows.view(_NATIVE[kind]), None, ["C", "A"])
        try:
            return dequantize(rows, kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {self.name} is stored as {self.dtype}, "
                "which the gguf package cannot dequantise"
            ) from error

    def _release(self, begin: int, end: int) -> None:
        first, row_bytes = self.stored.data_offset, self.stored.n_bytes / self.shape[0]
        release_pages(self.mapping, first + int(begin * row_bytes), first + int(end * row_bytes))


class GgufFile:
    """An open GGUF file: its metadata, a Hugging Face config made from it, and its tensors.

    Raises FileNotFoundError; ValueError naming the file when it is corrupt, truncated, or of an
    architecture or with a trait that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file {path}")
        try:
            reader = _Reader(path)
            self.metadata: Mapping[str, Any] = MappingProxyType(
                {key: field.contents() for key, field in reader.fields.items()}
            )
        except Exception as error:  # the gguf package raises whatever NumPy stumbles over
            raise ValueError(f"{path}: not a readable GGUF file: {error}") from error
        if reader.byte_order != "I":
            raise ValueError(f"{path}: the file is of the other byte order than this machine")
        self._stored: dict[str, gguf.ReaderTensor] = {t.name: t for t in reader.tensors}
        self._mapping = reader.mapping
        factors = self._stored.get(_ROPE_FACTORS)
        try:
            self.config: Mapping[str, Any] = MappingProxyType(
                hf_config(
                    self.metadata,
                    has_output="output.weight" in self._stored,
                    rope_factors=None if factors is None else factors.data.tolist(),
                )
            )
        except (ValueError, TypeError) as error:  # a TypeError: metadata of the wrong kind
            raise ValueError(f"{path}: {error}") from error

    def tensors(self) -> dict[str, GgufTensor]:
        """All weights under their Hugging Face names, in the order of the file.

        A tensor without such a name keeps its own, for the loader to report.
        """
        heads = {
            "attn_q.weight": self.config["num_attention_heads"],
            "attn_k.weight": self.config["num_key_value_heads"],
        }
        is_gemma = self.metadata["general.architecture"] == "gemma3"
        layer_names = _GEMMA3_LAYER_NAMES if is_gemma else _LAYER_NAMES
        tensors = {}
        for stored in sorted(self._stored.values(), key=lambda t: t.data_offset):
            if stored.name == _ROPE_FACTORS:
                continue  # part of the config
            name, layer = stored.name, _LAYER_TENSOR.fullmatch(stored.name)
            if layer is not None and layer[2] in layer_names:
                name = f"model.layers.{layer[1]}.{layer_names[layer[2]]}"
            name = _TOP_NAMES.get(name, name)
            tensors[name] = GgufTensor(
                name=name,
                shape=tuple(int(size) for size in reversed(stored.shape)),
                dtype=stored.tensor_type.name,
                path=self.path,
                stored=stored,
                heads=heads.get(layer[2], 0) if layer is not None and not is_gemma else 0,
                mapping=self._mapping,
                is_offset=is_gemma and stored.name.endswith("_norm.weight"),
            )
        return tensors


def dequantize(rows: NDArray[Any], kind: gguf.GGMLQuantizationType) -> NDArray[np.float32]:
    """float32 values of rows, by as many threads as they are worth: NumPy lets them run at once."""
    parts = np.array_split(rows, max(1, min(_MAX_THREADS, rows.nbytes // _THREAD_BYTES)))
    if len(parts) == 1:
        return np.require(gguf.quants.dequantize(rows, kind), np.float32, ["C", "A"])
    values = np.empty(gguf.quants.quant_shape_from_byte_shape(rows.shape, kind), np.float32)
    ends = np.cumsum([len(part) for part in parts])

    def fill(part: NDArray[Any], end: int) -> None:
        values[end - len(part) : end] = gguf.quants.dequantize(part, kind)

    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(fill, parts, ends))
    return values


def _half_split_order(rows: int, heads: int) -> NDArray[np.intp]:
    """For each row of the Hugging Face layout, the row of the GGUF layout it is found in.

    Within a head of D rows, GGUF row 2i holds what the model calls row i, and 2i + 1 row i + D/2.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).ravel()
