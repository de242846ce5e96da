"""Datasets of the Hugging Face hub, brought to local Parquet files before anything else looks at them.

Tokenizing reads the text three times (splitting, training, encoding). A streamed dataset would be downloaded three
times, and could differ between passes, so its text column is first copied to the scratch directory; everything after
that is the same as for local files. The copy is compressed, survives a crash, and goes when the stage is committed.

    scratch_dir/hub-streamed/share-00000/part-00000/text.parquet ...     (lazypipe.stages.kept_work)

A part holds about 64 MiB of text and knows the state of the stream at its end, so that an interrupted copy goes on
behind its last whole part, without reading again what came before, and ends with the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazypipe.stages.contract import Context, Interrupted, UserError
from lazypipe.stages.data.rows import missing_column
from lazypipe.stages.data.source_files import SourceFile
from lazypipe.stages.data.sources import HubSource
from lazypipe.stages.kept_work import keep, kept, sweep_unfinished, work_key

# Rows of one copied file when the dataset is already on disk, and therefore the grain of parallel copying.
_ROWS_PER_FILE = 65_536
_ROW_GROUP_BYTES = 16 * 2**20
_PART_BYTES = 64 * 2**20
_TEXT_FILE = "text.parquet"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Share:
    """Part of a dataset (a `datasets` object, which pickles as a reference to its files) and where to copy it.

    streamed: it is an IterableDataset. stop: a file whose existence asks to leave after the part in hand.
    """

    dataset: Any
    streamed: bool
    column: str
    name: str
    folder: Path
    key: str
    stop: Path


@dataclass(frozen=True)
class _Copied:
    """files: parts in row order. rows: in all of them. whole: the share ended. problem: why a kept part was no use."""

    files: list[Path]
    rows: int
    whole: bool
    problem: str | None


def resolve_commit(kind: str, name: str, revision: str | None) -> str:
    """The commit a hub dataset ("dataset") or tokenizer ("model") is at; asks the hub unless `revision` is a commit."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
        commit = ask(name, revision=revision, timeout=10).sha
    except Exception as error:  # network, authorisation, unknown repository: the library has a class for each
        raise UserError(
            f"the {kind} {name!r} could not be found at revision {revision or 'main'!r}: asked "
            f"{HfApi().endpoint} and got {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}. Check "
            "the name and the network (HF_ENDPOINT, HF_TOKEN), give a 40-digit commit as revision to plan without "
            "asking, or use a local directory or files"
        ) from None
    if commit is None:
        raise UserError(f"the hub names no commit for the {kind} {name!r} at revision {revision or 'main'!r}")
    return str(commit)


def copy_to_parquet(source: HubSource, context: Context) -> list[SourceFile]:
    """Copy the text column into scratch_dir and return the Parquet files in row order, through context.map.

    A streamed dataset is divided by its own shards, one on disk into row ranges; max_documents makes it one share.
    """
    folder = context.scratch_dir / ("hub-streamed" if source.streaming else "hub-rows")
    datasets = list(_shares(_load(source), source))
    shares = [
        _Share(
            dataset=dataset,
            streamed=source.streaming,
            column=source.text_column,
            name=source.dataset,
            folder=folder / f"share-{number:05d}",
            key=work_key(source.model_dump(mode="json"), number, len(datasets)),
            stop=context.scratch_dir / "stop",
        )
        for number, dataset in enumerate(datasets)
    ]
    for share in shares:
        share.folder.mkdir(parents=True, exist_ok=True)
        sweep_unfinished(share.folder)

    def report(rows: int) -> None:
        context.progress(rows, source.max_documents or rows, "rows", phase="copying the dataset")

    results = iter([_copy(shares[0], report)]) if len(shares) == 1 else context.map(_copy, shares)
    copied: list[_Copied] = []
    for share, result in zip(shares, results, strict=True):
        if result.problem is not None:
            context.warn(
                f"a kept part of {share.name} is damaged ({result.problem}); it was copied again, with what follows"
            )
        copied.append(result)
        context.progress(len(copied), len(shares), "shares", phase="copying the dataset")
        if not result.whole or context.stop_requested:
            rows = sum(share.rows for share in copied)
            raise Interrupted(
                f"stopped while {source.dataset} was copied: {rows} rows ({sum(share.whole for share in copied)} of "
                f"{len(shares)} shares whole) are kept, and the next run goes on from there"
            )
    return [SourceFile(file, "parquet", False) for result in copied for file in result.files]


def _load(source: HubSource) -> Any:
    import datasets

    try:
        dataset = datasets.load_dataset(
            source.dataset,
            source.config,
            split=source.split,
            streaming=source.streaming,
            revision=None if Path(source.dataset).is_dir() else source.revision,
        )
    except Exception as error:  # datasets raises its own, fsspec's, the hub's and built-in errors here
        hint = ""
        if source.streaming and "[" in source.split:
            hint = "; a streamed dataset takes whole splits only: use max_documents instead of a slice"
        raise UserError(
            f"source.dataset: {source.dataset!r} (config {source.config!r}, split {source.split!r}, "
            f"revision {source.revision!r}) could not be loaded: {type(error).__name__}: {error}{hint}"
        ) from None
    columns = dataset.column_names
    if columns is not None and source.text_column not in columns:
        raise UserError(
            f"the dataset {source.dataset!r} lacks the text column {missing_column(source.text_column, columns)}"
        )
    return dataset


def _shares(dataset: Any, source: HubSource) -> Iterator[Any]:
    if source.streaming:
        shards = dataset.num_shards
        if source.max_documents is not None:
            yield dataset.take(source.max_documents)
        else:
            yield from (dataset.shard(shards, number) for number in range(shards))
        return
    rows = len(dataset) if source.max_documents is None else min(len(dataset), source.max_documents)
    for start in range(0, max(rows, 1), _ROWS_PER_FILE):
        yield dataset.select(range(start, min(start + _ROWS_PER_FILE, rows)))


def _copy(share: _Share, report: Callable[[int], None] | None = None) -> _Copied:
    """Copy what is not there yet, part by part. report(rows so far) after each part."""
    files: list[Path] = []
    rows, state, whole = 0, None, False
    problem = None
    while not whole:
        target = share.folder / f"part-{len(files):05d}"
        key = work_key(share.key, len(files))
        earlier = kept(target, key)
        if earlier.facts is None:
            problem = earlier.problem
            break
        files.append(target / _TEXT_FILE)
        rows, state, whole = earlier.facts["rows"], earlier.facts["state"], earlier.facts["whole"]
    if not whole:
        part = _PartWriter(share, rows, state)
        while not part.whole and (not share.stop.exists() or not files):
            target = share.folder / f"part-{len(files):05d}"
            keep(target, work_key(share.key, len(files)), part.write)
            files.append(target / _TEXT_FILE)
            if report is not None:
                report(part.rows)
        rows, whole = part.rows, part.whole
    return _Copied(files, rows, whole, problem)


class _PartWriter:
    """A share read from row `rows` on (a stream: from its `state` there), and written part by part."""

    def __init__(self, share: _Share, rows: int, state: dict[str, Any] | None):
        self.share, self.rows, self.whole = share, rows, False
        dataset = share.dataset
        if not share.streamed:
            dataset = dataset.select(range(rows, len(dataset)))
        elif state is not None:
            dataset.load_state_dict(state)
        self._dataset = dataset
        self._iterator = iter(dataset)

    def write(self, directory: Path) -> dict[str, Any]:
        """One part: about _PART_BYTES of text in row groups of _ROW_GROUP_BYTES, or what is left of the share."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([pa.field(self.share.column, pa.large_string())])
        size = 0
        with pq.ParquetWriter(directory / _TEXT_FILE, schema, compression="zstd") as writer:
            while size < _PART_BYTES and not self.whole:
                texts = self._row_group()
                size += sum(len(text or "") for text in texts)
                if texts:
                    writer.write_table(pa.table([pa.array(texts, pa.large_string())], schema=schema))
        state = self._dataset.state_dict() if self.share.streamed else None
        return {"rows": self.rows, "state": state, "whole": self.whole}

    def _row_group(self) -> list[str | None]:
        texts: list[str | None] = []
        size = 0
        while size < _ROW_GROUP_BYTES:
            try:
                row = next(self._iterator)
            except StopIteration:
                self.whole = True
                break
            texts.append(_text(self.share, row, self.rows))
            self.rows += 1
            size += len(texts[-1] or "")
        return texts


def _text(share: _Share, row: dict[str, Any], number: int) -> str | None:
    if share.column not in row:
        raise UserError(
            f"row {number} of the dataset {share.name!r} lacks the text column {missing_column(share.column, row)}"
        )
    text = row[share.column]
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(
            f"the dataset {share.name!r}: column {share.column!r} holds {str(text)[:60]!r} "
            f"({type(text).__name__}), expected text; set source.text_column"
        )
    # Half a surrogate pair is no character; Parquet holds UTF-8.
    return text.encode("utf-8", errors="replace").decode("utf-8")
