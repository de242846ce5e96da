"""Which code ran: the commit and dirty diff of this package's repository, and digests of the sources themselves.

A manifest holds two digests. `sources_sha256` is that of all sources that compute results, byte for byte: while it is
the same nothing has changed. Where it differs, `stage_sha256` says whether the code of the stage itself has: a digest
of the syntax trees of the files its function imports (stage_sources.py). Manifests written before there was a
`stage_sha256` cannot tell a change of another stage's code from one of their own, so nothing is said of theirs.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lazypipe
from lazypipe.pipeline.planning.stage_sources import ROOMS, SyntaxTrees, stage_digest

PACKAGE = Path(lazypipe.__file__).parent  # holds the four packages: as links in a checkout, as folders elsewhere
PROJECT = PACKAGE.resolve().parent


@dataclass(frozen=True)
class CodeVersion:
    commit: str | None
    diff: str
    sources: str

    @property
    def dirty(self) -> bool:
        return bool(self.diff)

    def as_manifest(self) -> dict[str, str | bool | None]:
        digest = hashlib.sha256(self.diff.encode()).hexdigest() if self.diff else None
        return {"commit": self.commit, "dirty": self.dirty, "diff_sha256": digest, "sources_sha256": self.sources}


@cache
def sources_digest() -> str:
    """sha256 over the Python sources whose code computes results (stages, model, kernels)."""
    digest = hashlib.sha256()
    for package in ROOMS:
        for path in sorted((PACKAGE / package).rglob("*.py")):
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def stage_changed(function: str, code: Mapping[str, Any], trees: SyntaxTrees) -> bool:
    """Whether the code of a stage ("module:function") differs from the `code` that a manifest recorded."""
    if code.get("stage_sha256") is None or code.get("sources_sha256") == sources_digest():
        return False
    return bool(code["stage_sha256"] != stage_digest(PACKAGE, function, trees))


SHIPPED_FILE = "code_version.json"  # lies beside packages that were shipped to a cluster


def write_code_version(directory: Path) -> None:
    """Say in `directory`, which holds a copy of the packages, which commit and diff they came from."""
    code = code_version()
    (directory / SHIPPED_FILE).write_text(json.dumps({"commit": code.commit, "diff": code.diff}), encoding="utf-8")


@cache
def code_version() -> CodeVersion:
    """Commit and diff are None and empty where the package neither runs from its own git checkout nor was shipped."""
    if (PROJECT / SHIPPED_FILE).is_file():
        shipped = json.loads((PROJECT / SHIPPED_FILE).read_text(encoding="utf-8"))
        return CodeVersion(shipped["commit"], shipped["diff"], sources_digest())
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != PROJECT:
        return CodeVersion(None, "", sources_digest())
    commit = _git("rev-parse", "HEAD")
    return CodeVersion(commit.strip() if commit else None, _git("diff", "HEAD", "--no-color") or "", sources_digest())


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(PROJECT), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
