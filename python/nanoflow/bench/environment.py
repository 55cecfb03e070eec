"""What a result must say about where it was measured."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any


def origin(known_commit: str | None = None) -> dict[str, Any]:
    """What every result says: the command, the commit and versions.

    `known_commit`: what was measured, where git cannot say.
    """
    return {
        "command": command_line(),
        "commit": known_commit or commit(),
        "versions": versions(),
    }


def versions(packages: Iterable[str] = ("nanoflow", "numpy", "tokenizers")) -> dict[str, str]:
    """Versions of Python and of installed packages; "not installed" for an absent one."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def command_line() -> str:
    """The command of this process as a user types it, without folders of the machine."""
    program, words = Path(sys.argv[0]), sys.argv[1:]
    begin = len(sys.orig_argv) - len(words)
    # The process's words end with the program's, unless others stand in for these.
    interpreter = sys.orig_argv[1:begin] if sys.orig_argv[begin:] == words else []
    if "-m" in interpreter:
        start = ["python", "-m", interpreter[interpreter.index("-m") + 1]]
    elif program.suffix == ".py":
        start = ["python", os.path.relpath(program)]
    else:
        start = [program.name]
    return shlex.join([*start, *map(without_folders, words)])


def without_folders(word: str) -> str:
    """The last part of an absolute path, also behind "--flag="; other words as they are."""
    flag, equals, value = word.rpartition("=")
    return flag + equals + (Path(value).name if value.startswith(("/", "~")) else value)


def cpu_model() -> str:
    """Name of the processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the working directory's repository, "-dirty" when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
