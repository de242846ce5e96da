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
    scratch_dir/warnings-00000.jsonl   one line per `warn` call of rank 0: {"time", "rank", "step", "message"}; one file
                                per rank and per worker process of `map` (stages/warning_lines.py reads them)
    scratch_dir/stop       its existence asks the stage to save and leave (`stop_requested`)
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import math
import os
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lazypipe.stages.warning_lines import warning_text

if TYPE_CHECKING:
    from lazypipe.stages.facts import Facts

METRICS_FILE = "metrics.jsonl"
PROGRESS_FILE = "progress.json"

Item = TypeVar("Item")
Result = TypeVar("Result")
FactsT = TypeVar("FactsT", bound="Facts", covariant=True)
Warn = Callable[[str], object]  # `Context.warn`, or `warnings.warn` where no stage runs

ALIKE = 16  # warnings of one kind that are all written; of more, only the 32nd, the 64th, ...
_NUMBER = re.compile(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?|\b(?:nan|inf)\b")


class UserError(ValueError):
    """Something the user can fix: names the object, the value, what was expected and what to do. Exit code 2."""


class OldKeyWarning(FutureWarning):
    """A key of an experiment file has another name now; the message gives the new spelling."""


class Interrupted(Exception):  # noqa: N818  (an outcome, not an error)
    """The stage was asked to stop; it has saved what it needs to go on later."""


class DivergedError(RuntimeError):
    """Training gave up: too many steps in a row were not finite. A restart would not help."""


class StageWarning(UserWarning):
    """A warning of `Context.warn`, which has written it already; for whoever calls a stage without the pipeline."""


@dataclass(frozen=True)
class Artifact:
    """A committed generation of an upstream stage: its directory and its manifest (config, facts, metrics).

    The facts of its stage are read with the dataclass of stages/facts.py: `TokenizeFacts.read(artifact.manifest)`.
    """

    path: Path
    manifest: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, float]:
        metrics: Mapping[str, float] = self.manifest["metrics"]
        return metrics


@dataclass(frozen=True)
class Outputs(Generic[FactsT]):
    """What a stage returns besides its files.

    metrics: final values by name (finite floats; they become MLflow metrics; those declared in stages/metrics.py with
    a heading are columns of the report).
    facts: anything else worth keeping (counts, names, settings a downstream stage reads), see stages/facts.py.
    """

    metrics: dict[str, float]
    facts: FactsT


def map_serially(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    return map(function, items)


@dataclass
class Context:
    """All a stage may use from outside. `rank`/`world_size` are those of data-parallel training; only rank 0 writes,
    but for warnings. `process` names a process of the stage that is no rank, so that it has a warnings file of its own.
    """

    output_dir: Path
    scratch_dir: Path
    rank: int = 0
    world_size: int = 1
    map_function: Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]] = map_serially
    progress_interval_s: float = 0.5
    process: str = ""
    _last_progress: float = field(default=-math.inf, init=False, repr=False)
    _unwritten: bytes = field(default=b"", init=False, repr=False)
    _unwritten_warnings: bytes = field(default=b"", init=False, repr=False)
    _warned: dict[str, int] = field(default_factory=dict, init=False, repr=False)  # how many, by kind
    _warning_lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield `function(item)` for each item in order, possibly in other processes. Both must be picklable.

        What `function` warns of there by `warnings.warn` is written as warnings of this stage.
        """
        if self.map_function is map_serially:
            return map(function, items)
        routed = partial(_with_warnings, function, self.output_dir, self.scratch_dir)
        return self.map_function(update_wrapper(routed, function), items)

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
        _append(self.output_dir / METRICS_FILE, self._unwritten)
        self._unwritten = b""

    def warn(self, message: str, step: int | None = None) -> None:
        """Say what the user should know although the stage goes on: on the screen within seconds, in the manifest and
        in the report, from every rank. step: the optimizer step it belongs to; the message need not repeat it.

        The same message of several ranks is shown once. Messages that differ in their numbers alone are one kind, of
        which the first `ALIKE` are written, then the 32nd, the 64th and so on. It is issued as a `StageWarning` too,
        which a notebook shows.
        """
        self.write_warning(message, step)
        warnings.warn(warning_text({"message": message, "step": step}), StageWarning, stacklevel=2)

    def write_warning(self, message: str, step: int | None = None) -> None:
        """The line of `warn` alone. One that a full disk does not take goes to stderr, and waits in memory for the next
        call of this, of `progress` or of `flush_warnings`.
        """
        with self._warning_lock:
            kind = _NUMBER.sub("#", message)
            count = self._warned[kind] = self._warned.get(kind, 0) + 1
            if count > ALIKE:
                if count & (count - 1):
                    return
                message = f"{message} (warning {count} of this kind)"
            entry = {"time": time.time(), "rank": self.rank, "step": step, "message": message}
            self._unwritten_warnings += json.dumps(entry).encode() + b"\n"
        try:
            self.flush_warnings()
        except OSError:
            with contextlib.suppress(OSError):  # a log on the same disk
                print(f"warning: {warning_text(entry)}", file=sys.stderr, flush=True)

    def flush_warnings(self) -> None:
        """Write the lines of `warn` that wait in memory; OSError, with nothing of them on disk, if it cannot."""
        with self._warning_lock:
            if self._unwritten_warnings:
                name = f"warnings-{self.rank:05d}{self.process and '-'}{self.process}.jsonl"
                _append(self.scratch_dir / name, self._unwritten_warnings)
                self._unwritten_warnings = b""

    @contextmanager
    def routed_warnings(self) -> Iterator[None]:
        """Inside, every UserWarning of this process, of a library too, is written as one of the stage.

        Others go where they went before.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            show = warnings.showwarning

            def route(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
                if not issubclass(category, UserWarning):
                    show(message, category, *rest, **options)
                elif not issubclass(category, StageWarning):  # that one is written
                    self.write_warning(str(message))

            warnings.showwarning = route
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # a full disk: it was printed
                    self.flush_warnings()

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
        with contextlib.suppress(OSError):
            self.flush_warnings()
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


@lru_cache(maxsize=1)  # of the stage that this process works for: it counts the kinds of warnings
def _context_of_worker(output_dir: Path, scratch_dir: Path) -> Context:
    return Context(output_dir, scratch_dir, process=f"{socket.gethostname()}-{os.getpid()}")


def _with_warnings(function: Callable[[Item], Result], output_dir: Path, scratch_dir: Path, item: Item) -> Result:
    with _context_of_worker(output_dir, scratch_dir).routed_warnings():
        return function(item)


def _append(path: Path, lines: bytes) -> None:
    """Append whole lines, or none of them and OSError. What a killed process left half-written is ended first."""
    with path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            lines = lines if file.read(1) == b"\n" else b"\n" + lines
        if (file.write(lines) or 0) < len(lines):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def closest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """At most `count` of the names that look like a misspelt `name`, the likeliest first."""
    return difflib.get_close_matches(name, sorted(known), n=count, cutoff=0.5)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: '; did you mean 'lr'?' and the names there are."""
    names = sorted(known)
    hint = "".join(f"; did you mean {close!r}?" for close in closest(name, names))
    return f"{hint} (known: {', '.join(names)})"


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
