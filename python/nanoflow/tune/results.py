"""What was found for a device and a model, kept as JSON in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nanoflow
from nanoflow._core import Backend
from nanoflow.bench.default_model import cache_dir
from nanoflow.tune.costs import Spec, shape_of

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Key:
    """What a result is valid for."""

    device: str
    width: int
    driver: str  # empty on a CPU
    model: Mapping[str, Any]  # fields of Spec
    version: str  # of nanoflow

    def path(self, kind: str) -> Path:
        """Of the results of one kind: "tuned" or "searched"."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return cache_dir() / "schedules" / f"{kind}-{name}-{digest[:12]}.json"


def key_of(backend: Backend, spec: Spec) -> Key:
    version = nanoflow.__version__
    return Key(device_name(backend), backend.width, _driver(backend), shape_of(spec), version)


def device_name(backend: Backend) -> str:
    """ "NVIDIA H100 80GB HBM3", or "cpu (2 threads, amx)"."""
    match = re.fullmatch(r"cuda:\d+ \((.*), \d+ SMs\)", backend.description)
    return match[1] if match else str(backend.description)


def save_result(path: Path, key: Key, content: Mapping[str, Any]) -> None:
    """In one step, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"key": asdict(key), **content}, indent=1) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def load_result(path: Path, key: Key) -> dict[str, Any] | None:
    """None where there is no result for the key, or none that can be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if content.get("key") == asdict(key) else None


def _driver(backend: Backend) -> str:
    if not backend.device.startswith("cuda") or not _DRIVER.exists():
        return ""
    match = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", _DRIVER.read_text())
    return match[1] if match else ""
