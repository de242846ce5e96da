"""Finished work that outlives its process: folders below scratch_dir, each whole or absent.

    <folder>/<name>/   the files of one piece of work, then manifest.json: {key, facts, files: {name: size, sha256}}

A folder is filled under a temporary name and renamed when its manifest is written. Its key says what it was made from:
content hashes and settings, never paths or times, so work is taken up again only where it would come out the same.
Nothing is fsynced: what a power cut damages, the hashes find, and that piece is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazypipe.stages.contract import first_line
from lazypipe.stages.files import describe_files, files_problem

KEPT_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Kept:
    """What is known about a folder: its facts when it is whole and of the wanted key; else a problem if damaged."""

    facts: dict[str, Any] | None
    problem: str | None = None


def work_key(*parts: Any) -> str:
    """sha256 (hex) of JSON values: what a piece of work is made from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def keep(target: Path, key: str, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """`write(directory)` fills a temporary directory and returns JSON facts; then it becomes `target`, replacing it."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        facts = write(temporary)
        manifest = {"key": key, "facts": facts, "files": describe_files(sorted(temporary.iterdir()))}
        (temporary / KEPT_MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except BaseException:  # Interrupted too: half a piece of work is none
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return facts


def kept(target: Path, key: str) -> Kept:
    """Look at a folder that `keep` may have made. Work of another key is no work and no problem."""
    path = target / KEPT_MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["key"] != key:
            return Kept(None)
        problem = files_problem(target, manifest["files"])
        return Kept(dict(manifest["facts"])) if problem is None else Kept(None, problem)
    except FileNotFoundError as error:
        return Kept(None, None if not target.exists() else f"{error.filename} is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Kept(None, f"{path}: {first_line(error)}")


def sweep_unfinished(folder: Path) -> None:
    """Remove what killed processes left half-written. Call it before work begins, with the folder to yourself."""
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
