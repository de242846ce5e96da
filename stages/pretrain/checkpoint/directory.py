"""Directories of resume checkpoints: how one is committed, verified, found and dropped.

    scratch_dir/checkpoints/step-00000120/           committed; manifest.json holds size and sha256 of every other file
    scratch_dir/checkpoints/.step-00000140.partial/  being written, or left behind by a process killed while it wrote

A checkpoint is renamed into place after all of its files and its manifest are on disk, and an older one goes only after
that, so a kill at any moment leaves the newest committed checkpoint whole. Imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lazypipe.stages.contract import write_atomically
from lazypipe.stages.files import describe_files, files_problem

CHECKPOINT_MANIFEST = "manifest.json"
CHECKPOINT_FORMAT = 2  # 1: weights.safetensors and optimizer.safetensors, no "format" in the manifest


def partial_checkpoint(folder: Path, step: int) -> Path:
    """The directory that the checkpoint of `step` is written to; its name tells all workers the same place."""
    return folder / f".step-{step:08d}.partial"


def open_partial(folder: Path, step: int) -> Path:
    """Make it, empty. What killed processes left is swept first: the caller is the only one who writes here."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    partial = partial_checkpoint(folder, step)
    partial.mkdir()
    return partial


def describe_durably(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """`describe_files` of files that are on disk (fsync) when this returns."""
    files = list(files)
    for path in files:
        fsync(path)
    return describe_files(files)


def commit_checkpoint(partial: Path, step: int, files: Mapping[str, Mapping[str, Any]], **facts: Any) -> Path:
    """Write the manifest over `files` (of `describe_durably`) and rename the directory to step-<step>; returns that."""
    manifest = {"format": CHECKPOINT_FORMAT, "step": step, **facts, "files": files}
    write_atomically(partial / CHECKPOINT_MANIFEST, json.dumps(manifest))
    fsync(partial)
    target = partial.with_name(f"step-{step:08d}")
    _put_aside(target)  # only one that was damaged: training would have gone on from it otherwise
    partial.rename(target)
    fsync(target.parent)
    return target


def prune_checkpoints(newest: Path, keep: int, keep_every: int | None = None) -> None:
    """Drop what is not among the `keep` newest up to `newest`, nor of a step that `keep_every` divides.

    One of a later step than `newest` was damaged, or training would have gone on from it; it goes as well, for it would
    push good ones out.
    """
    saved = sorted(newest.parent.glob("step-*"))
    position = saved.index(newest)
    for old in saved[: max(0, position + 1 - keep)]:
        if keep_every is None or checkpoint_step(old) % keep_every:
            _put_aside(old)
    for later in saved[position + 1 :]:
        _put_aside(later)


def newest_checkpoint(folder: Path, warn: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint whose every file matches its manifest, or None; each damaged one is said to `warn`."""
    for directory in sorted(folder.glob("step-*"), reverse=True):
        problem = checkpoint_problem(directory)
        if problem is None:
            return directory
        if warn is not None:
            warn(f"checkpoint {directory} is damaged ({problem}); trying the one before")
    return None


def checkpoint_step(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def checkpoint_problem(directory: Path, only: Iterable[str] | None = None) -> str | None:
    """Why a checkpoint cannot be trusted, or None when its files, or those named in `only`, match its manifest."""
    try:
        files = json.loads((directory / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))["files"]
        return files_problem(directory, files if only is None else {name: files[name] for name in only})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKPOINT_MANIFEST}: {error}"


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_aside(directory: Path) -> None:
    """Remove a checkpoint so that a crash in the middle leaves no half of it under its name."""
    if directory.exists():
        aside = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
