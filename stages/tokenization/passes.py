"""The two passes over the whole corpus, unit by unit through context.map, and what a later attempt finds of them.

    scratch_dir/tokenization/scans/unit-000000/   units/unit-000000/   tokenizer/      (stages/kept_work.py)

A unit that is done is done: the attempt after a crash or a stop takes it up, byte for byte what it would compute, and
goes on with the rest.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lazypipe.stages.contract import Context, Interrupted
from lazypipe.stages.data.source_files import SourceFile, file_facts, source_files
from lazypipe.stages.data.sources import HubSource
from lazypipe.stages.kept_work import sweep_unfinished, work_key
from lazypipe.stages.tokenization.config import TokenizeConfig
from lazypipe.stages.tokenization.documents import Layout, Part, plan_units
from lazypipe.stages.tokenization.encode import Coder, EncodedSplit, EncodeTask, encode_unit
from lazypipe.stages.tokenization.scan import PartScan, ScanTask, scan_unit
from lazypipe.stages.tokenization.split import Split

Item = TypeVar("Item")
Result = TypeVar("Result")

KEPT_DIRECTORY = "tokenization"


@dataclass(frozen=True)
class Corpus:
    """A source after the first pass: its parts in units, what each holds, and how many units an earlier attempt had
    hashed. keys: of each unit, what was read and how."""

    layout: Layout
    units: list[tuple[Part, ...]]
    scans: list[list[PartScan]]
    keys: list[str]
    resumed: int

    def column(self, name: str) -> npt.NDArray[Any]:
        """A field of PartScan over all rows."""
        return np.concatenate([getattr(scan, name) for unit in self.scans for scan in unit])


@dataclass(frozen=True)
class Encoded:
    """All units. splits: by name, one EncodedSplit per unit in order; the rest summed over units."""

    splits: dict[str, list[EncodedSplit]]
    token_counts: npt.NDArray[np.int64]
    eos_in_text: int
    resumed: int


def kept_folder(context: Context, name: str) -> Path:
    """scratch_dir/tokenization/<name>, made, and free of what a killed process left half-written."""
    folder = context.scratch_dir / KEPT_DIRECTORY / name
    folder.mkdir(parents=True, exist_ok=True)
    sweep_unfinished(folder)
    return folder


def scan_corpus(config: TokenizeConfig, context: Context) -> Corpus:
    """Bring the source to files, cut them into units and hash every document."""
    source = config.source
    files: list[SourceFile]
    if isinstance(source, HubSource):
        from lazypipe.stages.data.hub import copy_to_parquet

        files = copy_to_parquet(source, context)
    else:
        files = source_files(source)
    layout = Layout(getattr(source, "text_column", "text"), getattr(source, "document_separator", None))
    facts = list(file_facts(files, context.scratch_dir))
    sha256 = {file.path: found.sha256 for file, found in zip(files, facts, strict=True)}
    units = plan_units(
        [(file, found.text_bytes) for file, found in zip(files, facts, strict=True)], layout, config.shard_bytes
    )
    refuse_invalid = config.invalid_utf8 == "refuse"
    read = [config.STAGE_VERSION, asdict(layout), refuse_invalid]
    keys = [
        work_key(*read, [[sha256[p.file.path], p.file.format, p.file.gzip, p.start, p.end] for p in unit])
        for unit in units
    ]
    folder = kept_folder(context, "scans")
    tasks = [
        ScanTask(unit, layout, refuse_invalid, folder, _unit_name(number), key)
        for number, (unit, key) in enumerate(zip(units, keys, strict=True))
    ]
    total = sum(part.size for unit in units for part in unit)
    scans: list[list[PartScan]] = []
    done = resumed = 0
    for unit, scan in zip(units, _map(scan_unit, tasks, context), strict=True):
        _warn_of_damage(scan.problem, "read", context)
        scans.append(scan.parts)
        resumed += scan.resumed
        done += sum(part.size for part in unit)
        context.progress(done, total, "bytes", phase="reading")
        stop_if_asked(context, f"{len(scans)} of {len(units)} units are read; they are kept")
    return Corpus(layout, units, scans, keys, resumed)


def encode_corpus(
    config: TokenizeConfig, corpus: Corpus, sizes: npt.NDArray[np.int64], split: Split, coder: Coder, context: Context
) -> Encoded:
    """Encode every unit to shards. sizes: int64 [rows], UTF-8 bytes after filtering."""
    total = int(sizes.sum())
    tasks = _encode_tasks(config, corpus, sizes, split, coder, context)
    began = time.monotonic()
    state = "the hashes and the tokenizer are kept"

    def report(done_bytes: int, done_tokens: int) -> None:
        stop_if_asked(context, state)
        seconds = max(time.monotonic() - began, 1e-9)
        context.progress(
            done_bytes,
            total,
            "bytes",
            phase="encoding",
            mb_per_s=round(done_bytes / seconds / 1e6, 2),
            tokens_per_s=round(done_tokens / seconds),
            eta_s=round((total - done_bytes) * seconds / max(done_bytes, 1), 1),
        )

    # A single unit is encoded here, with the library's threads, and reports within.
    results = iter([encode_unit(tasks[0], report)]) if len(tasks) == 1 else _map(encode_unit, tasks, context)
    # Summed as they come: a count per token id and unit would be 400 KB a unit.
    splits: dict[str, list[EncodedSplit]] = {"train": [], "validation": []}
    token_counts = np.zeros(coder.num_ids, dtype=np.int64)
    done_bytes = done_tokens = eos_in_text = resumed = 0
    for number, unit in enumerate(results, start=1):
        _warn_of_damage(unit.problem, "encoded", context)
        for name, part in unit.splits.items():
            splits[name].append(part)
            done_bytes += part.bytes
            done_tokens += part.tokens
        token_counts += unit.token_counts
        eos_in_text += unit.eos_in_text
        resumed += unit.resumed
        state = f"{number} of {len(tasks)} units are encoded; they, the hashes and the tokenizer are kept"
        report(done_bytes, done_tokens)
    return Encoded(splits, token_counts, eos_in_text, resumed)


def _encode_tasks(
    config: TokenizeConfig, corpus: Corpus, sizes: npt.NDArray[np.int64], split: Split, coder: Coder, context: Context
) -> list[EncodeTask]:
    folder = kept_folder(context, "units")
    how = [
        config.validation_fraction,
        config.shard_bytes,
        [coder.sha256, coder.eos_id, coder.eos_token, coder.num_ids, coder.token_dtype],
        version("tokenizers"),
    ]
    tasks = []
    first_row = 0
    for number, (unit, scans, scan_key) in enumerate(zip(corpus.units, corpus.scans, corpus.keys, strict=True)):
        rows = slice(first_row, first_row + sum(scan.rows for scan in scans))
        sides = split.sides[rows]
        tasks.append(
            EncodeTask(
                unit=unit,
                layout=corpus.layout,
                first_row=first_row,
                sides=sides,
                sizes=sizes[rows],
                validation_fraction=config.validation_fraction,
                coder=coder,
                shard_bytes=config.shard_bytes,
                folder=folder,
                name=_unit_name(number),
                key=work_key(scan_key, first_row, sides_key(sides), how),
                parent_pid=os.getpid(),
            )
        )
        first_row = rows.stop
    return tasks


def sides_key(sides: npt.NDArray[np.uint8]) -> str:
    """A key of which rows are trained on, held out or left out."""
    return hashlib.sha256(sides.tobytes()).hexdigest()


def stop_if_asked(context: Context, state: str) -> None:
    """Interrupted, with what is kept, when the stage was asked to stop."""
    if context.stop_requested:
        raise Interrupted(f"tokenization stopped: {state}, and the next run goes on from there")


def _map(function: Callable[[Item], Result], items: Sequence[Item], context: Context) -> Iterator[Result]:
    """context.map, except that a single item stays here."""
    return map(function, items) if len(items) == 1 else context.map(function, items)


def _unit_name(number: int) -> str:
    return f"unit-{number:06d}"


def _warn_of_damage(problem: str | None, again: str, context: Context) -> None:
    if problem is not None:
        context.warn(f"a kept unit is damaged ({problem}); it was {again} again")
