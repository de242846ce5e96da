"""The stage store: where results live, and how a reader can trust them.

    <root>/store/<stage>/<first 12 of the fingerprint>/
        g0001/            a generation: the stage's files, then manifest.json, last
        current           the name of the valid generation, switched atomically after its manifest is on disk
        scratch/          the running (or interrupted) execution: checkpoints, progress, the MLflow run it logs to
        lease.json        who is executing this recipe now (pipeline/store/lease.py)

A generation without a manifest is a leftover of a crash and is swept by the next execution of its recipe.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazypipe.stages.contract import PROGRESS_FILE, Artifact, file_sha256, write_atomically
from lazypipe.stages.files import files_problem

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class Generation:
    """A committed execution of a recipe."""

    path: Path
    manifest: dict[str, Any]

    @property
    def id(self) -> str:
        """'<stage>/<fingerprint12>/<generation>'"""
        return "/".join(self.path.parts[-3:])

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    def artifact(self) -> Artifact:
        return Artifact(self.path, self.manifest)

    def problem(self, full: bool = False) -> str | None:
        """Why the files cannot be trusted, or None. Sizes; sha256 where the mtime moved, or everywhere if full."""
        return files_problem(self.path, self.manifest["files"], trust_mtime=not full)


@dataclass(frozen=True)
class Entry:
    """All generations of one recipe."""

    path: Path

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    def current(self) -> Generation | None:
        """The valid generation, or None. Its files are not checked here: see Generation.problem.

        Without a `current` file, the newest committed generation whose files are intact: a kill came between its
        manifest and `current`, or somebody deleted `current`. Raises OSError or ValueError when there are committed
        generations but none of them can be used, or when `current` names one that cannot be read: see `damage`.
        """
        try:
            name = (self.path / "current").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return self._newest_intact()
        return read_generation(self.path / name)

    def _newest_intact(self) -> Generation | None:
        problems = []
        for directory in reversed(self._generations()):
            if not (directory / MANIFEST).exists():
                continue
            try:
                generation = read_generation(directory)
                problem = generation.problem()
            except (OSError, ValueError) as error:
                problem = str(error)
            if problem is None:
                return generation
            problems.append(problem)
        if problems:
            raise ValueError(f"missing, and no generation beside it is intact ({'; '.join(problems)})")
        return None

    def damage(self) -> str | None:
        """Why the generation that `current` names, or stood for, cannot be read; or None."""
        try:
            self.current()
        except (OSError, ValueError) as error:
            return f"{self.path / 'current'}: {error}"
        return None

    def next_generation(self) -> str:
        return f"g{max((int(p.name[1:]) for p in self._generations()), default=0) + 1:04d}"

    def _generations(self) -> list[Path]:
        """Oldest first; by number, for g10000 sorts before g9999."""
        found = [p for p in self.path.glob("g*") if re.fullmatch("g[0-9]{4,}", p.name) and p.is_dir()]
        return sorted(found, key=lambda p: int(p.name[1:]))

    def uncommitted(self) -> list[Path]:
        """Directories of generations without a manifest: of a running execution, or left behind by a crash."""
        return [directory for directory in self._generations() if not (directory / MANIFEST).exists()]

    def sweep(self) -> list[str]:
        """Remove generations that were never committed; returns their names. Call it with the lease held."""
        leftovers = self.uncommitted()
        for directory in leftovers:
            shutil.rmtree(directory)
        return [directory.name for directory in leftovers]

    def open_scratch(self, input_generations: Mapping[str, str], fresh: bool) -> Path:
        """The scratch directory, emptied when `fresh` or when it was filled from other input generations."""
        marker = self.scratch / "inputs.json"
        wanted = json.dumps(dict(input_generations), sort_keys=True)
        try:
            found = marker.read_text(encoding="utf-8")
        except OSError:
            found = ""
        if fresh or found != wanted:
            shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True, exist_ok=True)
        for leftover in ("stop", PROGRESS_FILE):
            (self.scratch / leftover).unlink(missing_ok=True)
        write_atomically(marker, wanted)
        return self.scratch

    def commit(self, name: str, manifest: Mapping[str, Any]) -> Generation:
        """Write the manifest of generation `name` (files are listed and hashed here), then make it current."""
        directory = self.path / name
        full = {**manifest, "format": MANIFEST_FORMAT, "generation": name, "files": dict(_listed(directory))}
        write_atomically(directory / MANIFEST, json.dumps(full, indent=1, sort_keys=True) + "\n")
        current = self.path / "current"
        if current.is_dir() and not current.is_symlink():  # never made here, and a file cannot be renamed over it
            shutil.rmtree(current)
        write_atomically(current, name + "\n")
        shutil.rmtree(self.scratch, ignore_errors=True)
        return read_generation(directory)


def _listed(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            status = file.stat()
            yield (
                file.relative_to(directory).as_posix(),
                {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": file_sha256(file)},
            )


def read_generation(directory: Path) -> Generation:
    """Raises OSError or ValueError for a manifest that is missing, damaged or of another format."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} holds a {type(manifest).__name__}, expected a mapping")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')!r}, expected {MANIFEST_FORMAT}")
    for key in ("fingerprint", "files", "inputs", "metrics", "facts", "config"):
        if key not in manifest:
            raise ValueError(f"{path} lacks {key!r}")
    for name, entry in _mapping(path, manifest, "files").items():
        if not isinstance(entry, dict) or not {"size", "mtime_ns", "sha256"} <= entry.keys():
            raise ValueError(f"{path}: files: {name}: expected size, mtime_ns and sha256, found {entry!r}")
    for name, entry in _mapping(path, manifest, "inputs").items():
        if not isinstance(entry, dict) or not {"fingerprint", "generation"} <= entry.keys():
            raise ValueError(f"{path}: inputs: {name}: expected fingerprint and generation, found {entry!r}")
    return Generation(directory, manifest)


def _mapping(path: Path, manifest: dict[str, Any], key: str) -> dict[str, Any]:
    value = manifest[key]
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key}: expected a mapping, found {value!r}")
    return value


@dataclass(frozen=True)
class Store:
    root: Path

    def entry(self, stage: str, fingerprint: str) -> Entry:
        return Entry(self.root / "store" / stage / fingerprint[:12])

    def entries(self, stage: str) -> list[Entry]:
        """Every recipe of a stage that was ever executed or begun here."""
        return [Entry(p) for p in sorted((self.root / "store" / stage).glob("*")) if p.is_dir()]

    def generations(self, stage: str) -> list[Generation]:
        """The current generation of every recipe of a stage, oldest first; unreadable ones are passed over."""
        found = []
        for entry in self.entries(stage):
            if entry.damage() is None and (generation := entry.current()) is not None:
                found.append(generation)
        return sorted(found, key=lambda g: str(g.manifest.get("created", "")))
