"""What tells the weights of one checkpoint from those of another, without reading all of them."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path

from nanoflow.loading.checkpoint import Checkpoint

_SAMPLES = 64  # of each file, evenly spread
_SAMPLE_BYTES = 4096


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of the config, and of names, sizes and samples of the files with the weights."""
    digest = blake2b(digest_size=16)
    digest.update(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    digest.update(checkpoint.load_format.encode())
    if checkpoint.load_format == "dummy":
        digest.update(str(checkpoint.seed).encode())
        return digest.hexdigest()
    for path in _weight_files(checkpoint.path):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted([*path.glob("*.safetensors"), *path.glob("*.gguf")])
