"""Checkpoint directories: what reaches the disk, in which order, and what a crash or damage leaves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lazypipe.stages.pretrain.checkpoint import directory as checkpoints
from lazypipe.stages.pretrain.checkpoint.directory import (
    CHECKPOINT_MANIFEST,
    checkpoint_problem,
    checkpoint_step,
    commit_checkpoint,
    describe_durably,
    newest_checkpoint,
    open_partial,
    prune_checkpoints,
)


def save(folder: Path, step: int, text: str = "a", keep: int = 2, keep_every: int | None = None) -> Path:
    partial = open_partial(folder, step)
    files = [partial / "weights.bin", partial / "optimizer.bin"]
    for copies, file in enumerate(files, start=1):
        file.write_text(text * copies)
    committed = commit_checkpoint(partial, step, describe_durably(files), world_size=2)
    prune_checkpoints(committed, keep, keep_every)
    return committed


def steps(folder: Path) -> list[int]:
    """The checkpoints there; nothing else may lie beside them."""
    return sorted(checkpoint_step(p) for p in folder.iterdir())


def test_a_checkpoint_is_found_again_with_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert newest_checkpoint(folder) is None
    saved = save(folder, 120)
    assert saved.name == "step-00000120" and checkpoint_problem(saved) is None
    assert newest_checkpoint(folder) == saved
    assert {p.name for p in saved.iterdir()} == {"weights.bin", "optimizer.bin", CHECKPOINT_MANIFEST}
    manifest = json.loads((saved / CHECKPOINT_MANIFEST).read_text())
    assert (manifest["step"], manifest["world_size"], manifest["files"]["optimizer.bin"]["size"]) == (120, 2, 2)


@pytest.mark.parametrize("crash_at", ["write_atomically", "describe_files", "fsync"])
def test_a_crash_anywhere_before_the_rename_leaves_no_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: str
) -> None:
    before = save(tmp_path, 10)

    def crash(*_: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, crash_at, crash)
        with pytest.raises(OSError, match="killed"):
            save(tmp_path, 20)
    assert newest_checkpoint(tmp_path) == before
    save(tmp_path, 30)
    assert steps(tmp_path) == [10, 30], "nothing is left of the one that failed"


def test_the_one_before_goes_only_after_the_new_one_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every rename and removal of a save with keep=1 there is an intact checkpoint."""
    save(tmp_path, 10, keep=1)
    seen = []

    def spied(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            before, result = newest_checkpoint(tmp_path), function(*arguments, **keywords)
            seen.extend([before, newest_checkpoint(tmp_path)])
            return result

        return call

    monkeypatch.setattr(Path, "rename", spied(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", spied(shutil.rmtree))
    save(tmp_path, 20, keep=1)
    assert len(seen) >= 6 and None not in seen
    assert steps(tmp_path) == [20]


def test_the_newest_are_kept_and_every_so_many_steps_one_for_good(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == [100, 1000]
    save(tmp_path, 1005, keep=1)
    assert steps(tmp_path) == [1005]
    for step in range(1010, 1080, 10):
        save(tmp_path, step, keep=2, keep_every=30)
    assert steps(tmp_path) == [1020, 1050, 1060, 1070]


def test_a_step_saved_again_replaces_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 10)
    saved = save(tmp_path, 10, "b")
    assert steps(tmp_path) == [10] and (saved / "weights.bin").read_text() == "b"


def test_a_damaged_later_checkpoint_does_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    good = save(tmp_path, 40, keep=1)
    damaged = save(tmp_path, 60, keep=2)
    (damaged / "weights.bin").unlink()
    assert newest_checkpoint(tmp_path) == good
    saved = save(tmp_path, 50, keep=1)  # resumed from 40, with another interval
    assert newest_checkpoint(tmp_path) == saved
    assert steps(tmp_path) == [50]


def truncate(directory: Path) -> None:
    os.truncate(directory / "weights.bin", 0)


def flip(directory: Path) -> None:
    (directory / "weights.bin").write_text("X")


def lose(directory: Path) -> None:
    (directory / "weights.bin").unlink()


def lose_manifest(directory: Path) -> None:
    (directory / CHECKPOINT_MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "weights.bin has 0 bytes, expected 1"),
        (flip, "weights.bin does not match its sha256"),
        (lose, "weights.bin is missing"),
        (lose_manifest, CHECKPOINT_MANIFEST),
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(tmp_path: Path, damage: Any, expected: str) -> None:
    older, newest = save(tmp_path, 10), save(tmp_path, 20)
    damage(newest)
    warnings: list[str] = []
    assert newest_checkpoint(tmp_path, warnings.append) == older
    assert len(warnings) == 1 and str(newest) in warnings[0] and expected in warnings[0]
    damage(older)
    assert newest_checkpoint(tmp_path, warnings.append) is None
    assert len(warnings) == 3


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"files": []}', '{"files": {"weights.bin": 3}}', "\x00"]
)
def test_an_unreadable_checkpoint_manifest_is_a_problem_and_no_crash(tmp_path: Path, text: str) -> None:
    saved = save(tmp_path, 10)
    (saved / CHECKPOINT_MANIFEST).write_text(text)
    assert CHECKPOINT_MANIFEST in str(checkpoint_problem(saved))
    assert CHECKPOINT_MANIFEST in str(checkpoint_problem(saved, only=["weights.bin"]))
