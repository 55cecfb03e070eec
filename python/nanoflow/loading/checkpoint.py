"""A model name or path -> an open checkpoint: config, tensors, and where its tokenizer is found."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nanoflow.loading.dummy import fill_dummy_weights
from nanoflow.loading.gguf import GgufFile
from nanoflow.loading.gguf_config import token_ids
from nanoflow.loading.loader import WeightStore, load_weights
from nanoflow.loading.safetensors import INDEX_NAME, SINGLE_NAME, open_safetensors_dir
from nanoflow.loading.tensors import CheckpointTensor
from nanoflow.models import ModelAdapter, ModelConfig, model_adapter

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
DTypeName = Literal["auto", "bfloat16", "float16", "float32", "half", "float"]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_ALIASES: Mapping[str, str] = {"half": "float16", "float": "float32"}
_STORED_DTYPES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk, opened but not loaded."""

    path: Path  # the directory or the .gguf file
    load_format: Literal["safetensors", "gguf", "dummy"]
    config: Mapping[str, Any]  # as in config.json
    generation_config: Mapping[str, Any]  # as in generation_config.json, empty without one
    adapter: ModelAdapter
    model: ModelConfig
    tokenizer_source: Path | GgufFile  # what Tokenizer.from_source takes
    seed: int  # of dummy weights
    gguf: GgufFile | None

    def tensors(self) -> Mapping[str, CheckpointTensor]:
        """All stored tensors by their Hugging Face names, in the order they lie on disk."""
        if self.gguf is not None:
            return self.gguf.tensors()
        return open_safetensors_dir(self.path)

    def resolve_dtype(self, requested: str = "auto") -> str:
        """The computing dtype: bfloat16, float16 or float32.

        "auto" is the config's dtype, or without one that of the stored tensors; bfloat16 for GGUF.
        Raises ValueError on any other name.
        """
        stated = requested
        if requested == "auto":
            stated = self.config.get("dtype") or self.config.get("torch_dtype") or ""
            if not stated and self.load_format == "dummy":
                stated = "bfloat16"
            if not stated:
                first = next(iter(self.tensors().values()))
                stated = _STORED_DTYPES.get(first.dtype, first.dtype)
        name = _ALIASES.get(stated, stated)
        if name not in _DTYPES:
            raise ValueError(
                f"dtype {stated!r} is not supported; supported: auto, {', '.join(_DTYPES)}"
            )
        return name

    def load_weights(self, store: WeightStore) -> None:
        """Fills `store` (a `_core.Weights` of this model); errors as loader.load_weights."""
        if self.load_format == "dummy":
            fill_dummy_weights(store, self.seed)
            return
        tensors = self.tensors()
        load_weights(
            store,
            tensors,
            self.adapter.stored_weights(self.model, tensors),
            lambda name: self.adapter.is_ignored(self.model, name),
            str(self.path),
        )


def open_checkpoint(
    model: str | Path,
    load_format: str = "auto",
    *,
    revision: str | None = None,
    seed: int = 0,
) -> Checkpoint:
    """Opens a local directory, a .gguf file, or a Hugging Face repository by its id.

    `load_format`: "auto" tells safetensors from GGUF by the path; "dummy" needs a config only and
    draws random weights from `seed`. A repository is taken from the local cache or downloaded.
    Raises FileNotFoundError when the model or one of its files is not there, ValueError when it is
    corrupt, unknown or not supported.
    """
    if load_format not in get_args(LoadFormat):
        raise ValueError(
            f"load_format {load_format!r} is unknown; known: {', '.join(get_args(LoadFormat))}"
        )
    path = _locate(model, load_format, revision)
    gguf_path = _gguf_path(path, load_format)
    if gguf_path is not None:
        file = GgufFile(gguf_path)
        config, generation_config = file.config, token_ids(file.metadata)
        source: Path | GgufFile = file
    else:
        file = None
        config = _read_json(path / "config.json")
        generation_path = path / "generation_config.json"
        generation_config = _read_json(generation_path) if generation_path.exists() else {}
        source = path
    found: Literal["safetensors", "gguf"] = "safetensors" if file is None else "gguf"
    try:
        adapter = model_adapter(config)
        parsed = adapter.parse_config(config)
    except (ValueError, TypeError) as error:  # a TypeError: a value of the wrong kind
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(
        path=path,
        load_format="dummy" if load_format == "dummy" else found,
        config=config,
        generation_config=generation_config,
        adapter=adapter,
        model=parsed,
        tokenizer_source=source,
        seed=seed,
        gguf=file,
    )


def _locate(model: str | Path, load_format: str, revision: str | None) -> Path:
    path = Path(model).expanduser()
    if path.exists():
        return path
    name = str(model)
    if isinstance(model, Path) or not _REPO_ID.fullmatch(name) or path.suffix == ".gguf":
        raise FileNotFoundError(f"model path {name} does not exist")
    return _fetch_repository(name, load_format, revision)


def _fetch_repository(name: str, load_format: str, revision: str | None) -> Path:
    patterns = ["*.json", "*.jinja"]
    if load_format != "dummy":
        patterns += [SINGLE_NAME, "model-*.safetensors", "model.safetensors-*"]
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # offline, unknown or gated repository, package absent
        reason = next(iter(str(error).strip().splitlines()), "")
        raise FileNotFoundError(
            f"model {name!r} is no local path and could not be had from the Hugging Face Hub; pass "
            f"the path of a local model ({type(error).__name__}: {reason})"
        ) from error


def _gguf_path(path: Path, load_format: str) -> Path | None:
    """The GGUF file to read, or None when `path` is a directory in Hugging Face's layout."""
    if path.is_file():
        if path.suffix != ".gguf" or load_format == "safetensors":
            raise ValueError(f"{path} is a file: only .gguf models are files, others directories")
        return path
    if load_format in ("safetensors", "dummy") and (path / "config.json").exists():
        return None
    has_safetensors = (path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists()
    if load_format == "auto" and has_safetensors:
        return None
    files = sorted(path.glob("*.gguf"))
    if load_format == "safetensors" or (load_format == "auto" and not files):
        return None
    if len(files) != 1:
        raise FileNotFoundError(
            f"{path} holds {len(files)} .gguf files; pass the path of the one to load"
        )
    return files[0]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content
