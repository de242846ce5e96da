"""Do the files of a directory match what a manifest says of them? The store, checkpoints and kept work all ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lazypipe.stages.contract import file_sha256

Files = Mapping[str, Mapping[str, Any]]  # name -> {"size": bytes, "sha256", and perhaps "mtime_ns"}


def describe_files(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """{name: {"size", "sha256"}} of files of one directory."""
    return {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in files}


def files_problem(directory: Path, files: Files, trust_mtime: bool = False) -> str | None:
    """Why the files cannot be trusted, or None. trust_mtime: no sha256 of a file whose mtime is the one described."""
    for name, entry in files.items():
        file = directory / name
        try:
            status = file.stat()
        except OSError:
            return f"{file} is missing"
        if status.st_size != entry["size"]:
            return f"{file} has {status.st_size} bytes, expected {entry['size']}"
        if trust_mtime and status.st_mtime_ns == entry["mtime_ns"]:
            continue
        if file_sha256(file) != entry["sha256"]:
            return f"{file} does not match its sha256"
    return None
