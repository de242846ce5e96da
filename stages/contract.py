"""The stage contract: `run(config, inputs, context) -> Outputs`.

A stage is a plain function. All it may use from outside is in its `Context`: where to write, how to spread work, how to
report numbers, figures and progress, and where its checkpoints live. Everything travels through files below two
directories, so the same stage runs in a unit test, a notebook, a Ray task or four Ray Train workers, and whoever
watches it (the pipeline's progress display, its MLflow logger) only has to read:

    output_dir/            whatever the stage produces; every file in it is an output
    output_dir/metrics.jsonl   one line per `log_metrics` call: {"step", "time", "metrics"}
    output_dir/figures/    `log_figure`            output_dir/tables/   `log_table`
    scratch_dir/           survives a crash of the stage; emptied once the outputs are committed
    scratch_dir/checkpoints/step-00000120/   stages/pretrain/checkpoint/directory.py
    scratch_dir/progress.json   the last `progress` call
    scratch_dir/stop       its existence asks the stage to save and leave (`stop_requested`)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

METRICS_FILE = "metrics.jsonl"
PROGRESS_FILE = "progress.json"

Item = TypeVar("Item")
Result = TypeVar("Result")


class UserError(ValueError):
    """Something the user can fix: names the object, the value, what was expected and what to do. Exit code 2."""


class Interrupted(Exception):  # noqa: N818  (an outcome, not an error)
    """The stage was asked to stop; it has saved what it needs to go on later."""


class DivergedError(RuntimeError):
    """Training gave up: too many steps in a row were not finite. A restart would not help."""


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
    _unwritten: bytes = field(default=b"", init=False, repr=False)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield `function(item)` for each item in order, possibly in other processes. Both must be picklable."""
        return self.map_function(function, items)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl. Non-finite values are dropped; the caller counts them if they matter.

        A line that a full disk does not take waits in memory for the next call, or for `flush_metrics`.
        """
        if self.rank != 0:
            return
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._unwritten += json.dumps({"step": step, "time": time.time(), "metrics": finite}).encode() + b"\n"
        with contextlib.suppress(OSError):
            self.flush_metrics()

    def flush_metrics(self) -> None:
        """Write the lines of `log_metrics` that wait in memory; OSError, with nothing of them on disk, if it cannot."""
        if not self._unwritten:
            return
        with (self.output_dir / METRICS_FILE).open("ab", buffering=0) as file:
            size = file.tell()
            if file.write(self._unwritten) < len(self._unwritten):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        self._unwritten = b""

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
        now_at = {"done": done, "total": total, "unit": unit, "time": time.time(), "numbers": numbers}
        with contextlib.suppress(OSError):  # a full disk must not end what the display only watches
            write_atomically(self.scratch_dir / PROGRESS_FILE, json.dumps(now_at), durable=False)

    @property
    def stop_requested(self) -> bool:
        return (self.scratch_dir / "stop").exists()


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
