"""The stage contract: `run(config, inputs, context) -> Outputs`.

A stage is a plain function. All it may use from outside is in its `Context`: where to write, how to spread work, how to
report numbers, pictures and progress, and where its checkpoints live. Everything travels through files below two
directories, so the same stage runs in a unit test, a notebook, a Ray task or four Ray Train workers, and whoever
watches it (the pipeline's progress display, its MLflow logger) only has to read:

    output_dir/            whatever the stage produces; every file in it is an output
    output_dir/metrics.jsonl   one line per `log_metrics` call: {"step", "time", "metrics"}
    output_dir/figures/    `log_figure`            output_dir/tables/   `log_table`
    scratch_dir/           survives a crash of the stage; emptied once the outputs are committed
    scratch_dir/checkpoints/step-00000120/   `save_checkpoint`
    scratch_dir/progress.json   the last `progress` call
    scratch_dir/stop       its existence asks the stage to save and leave (`stop_requested`)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

CHECKPOINT_MANIFEST = "manifest.json"


class Refusal(ValueError):  # noqa: N818  (a verdict on the input)
    """Something the user can fix: names the object, the value, what was expected and what to do. Exit code 2."""


class Interrupted(Exception):  # noqa: N818  (an outcome, not an error)
    """The stage was asked to stop; it has saved what it needs to go on later."""


@dataclass(frozen=True)
class Artifact:
    """A committed generation of an upstream stage: its directory and its manifest (config, facts, metrics)."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        facts: Mapping[str, Any] = self.manifest["facts"]
        return facts

    @property
    def metrics(self) -> Mapping[str, float]:
        metrics: Mapping[str, float] = self.manifest["metrics"]
        return metrics


@dataclass(frozen=True)
class Outputs:
    """What a stage returns besides its files.

    metrics: final numbers by name (finite floats; they become MLflow metrics and columns of the report).
    facts: anything else worth keeping, JSON-serialisable (counts, names, settings a downstream stage reads).
    """

    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def map_serially(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    return map(function, items)


@dataclass
class Context:
    """All a stage may use from outside. `rank`/`world_size` are those of data-parallel training; only rank 0 writes."""

    output_dir: Path
    scratch_dir: Path
    rank: int = 0
    world_size: int = 1
    map_function: Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]] = map_serially
    progress_interval_s: float = 0.5
    _last_progress: float = field(default=-math.inf, init=False, repr=False)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield `function(item)` for each item in order, possibly in other processes. Both must be picklable."""
        return self.map_function(function, items)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl. Non-finite values are dropped; the caller counts them if they matter."""
        if self.rank != 0:
            return
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        line = json.dumps({"step": step, "time": time.time(), "metrics": finite})
        with (self.output_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def log_figure(self, name: str, figure: Any) -> Path:
        """Save a matplotlib figure as output_dir/figures/<name>.png (150 dpi) and return its path."""
        path = self.output_dir / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight")
        return path

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Save rows as output_dir/tables/<name>.parquet and .json; return the Parquet path."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.output_dir / "tables" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
        path.with_suffix(".json").write_text(json.dumps([dict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
        return path

    def progress(self, done: float, total: float, unit: str, **numbers: float | str) -> None:
        """Say how far the stage is: `done` of `total` `unit`s, and numbers worth watching (loss=..., eta_s=...)."""
        now = time.monotonic()
        if self.rank != 0 or (now - self._last_progress < self.progress_interval_s and done < total):
            return
        self._last_progress = now
        write_atomically(
            self.scratch_dir / "progress.json",
            json.dumps({"done": done, "total": total, "unit": unit, "time": time.time(), "numbers": numbers}),
            durable=False,
        )

    @property
    def stop_requested(self) -> bool:
        return (self.scratch_dir / "stop").exists()

    def save_checkpoint(self, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
        """Commit a resume checkpoint atomically: `write(directory)` fills a temporary directory, which is renamed last.

        The manifest inside holds size and sha256 of every file, so a damaged checkpoint is recognised on load.
        The newest `keep` checkpoints stay.
        """
        folder = self.scratch_dir / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"step-{step:08d}"
        temporary = folder / f".{target.name}.{os.getpid()}"
        for leftover in folder.glob(".step-*"):  # of a process killed while it wrote
            shutil.rmtree(leftover)
        temporary.mkdir()
        write(temporary)
        files = {p.name: {"size": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(temporary.iterdir())}
        for name in files:
            _fsync(temporary / name)
        write_atomically(temporary / CHECKPOINT_MANIFEST, json.dumps({"step": step, "files": files}))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _fsync(folder)
        # One of a later step was damaged, or training would have gone on from it: it must not push this one out.
        saved = sorted(folder.glob("step-*"))
        for old in saved[: max(0, saved.index(target) + 1 - keep)] + saved[saved.index(target) + 1 :]:
            shutil.rmtree(old)
        return target

    def latest_checkpoint(self, warn: Callable[[str], None] | None = None) -> tuple[int, Path] | None:
        """(step, directory) of the newest intact checkpoint, or None. Damaged ones are passed over with a warning."""
        for directory in sorted((self.scratch_dir / "checkpoints").glob("step-*"), reverse=True):
            problem = checkpoint_problem(directory)
            if problem is None:
                return int(directory.name.removeprefix("step-")), directory
            if warn is not None:
                warn(f"checkpoint {directory} is damaged ({problem}); trying the one before")
        return None


def checkpoint_problem(directory: Path) -> str | None:
    """Why a checkpoint directory cannot be trusted, or None when every file matches its manifest."""
    manifest_path = directory / CHECKPOINT_MANIFEST
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes, expected {entry['size']}"
            if file_sha256(path) != entry["sha256"]:
                return f"{name} does not match its sha256"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKPOINT_MANIFEST}: {error}"
    return None


def first_line(error: BaseException | None) -> str:
    """An error in one line, for a message around it: its first line that says something, else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Replace `path` by `text` so that a reader, or a crash, sees the old or the new content and nothing between.

    `durable` also survives a power cut, at the price of an fsync.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, or interrupted
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
