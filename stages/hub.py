"""Datasets of the Hugging Face hub, brought to local Parquet files before anything else looks at them.

Tokenizing reads the text three times (splitting, training, encoding). A streamed dataset would be downloaded three
times, and could differ between passes, so its text column is first copied to the scratch directory; everything after
that is the same as for local files. The copy is compressed, survives a crash, and goes when the stage is committed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract import Context, Interrupted, Refusal
from stages.rows import missing_column
from stages.source_files import SourceFile
from stages.tokenize_config import HubSource

# Rows of one copied file when the dataset is already on disk, and therefore the grain of parallel copying.
_ROWS_PER_FILE = 65_536
_ROW_GROUP_BYTES = 16 * 2**20
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Share:
    """Part of a dataset (a `datasets` object, which pickles as a reference to its files) and where to copy it."""

    dataset: Any
    column: str
    name: str
    target: Path


def resolve_commit(kind: str, name: str, revision: str | None) -> str:
    """The commit a hub dataset ("dataset") or tokenizer ("model") is at; asks the hub unless `revision` is a commit."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
        commit = ask(name, revision=revision, timeout=10).sha
    except Exception as error:  # network, authorisation, unknown repository: the library has a class for each
        raise Refusal(
            f"the {kind} {name!r} could not be found at revision {revision or 'main'!r}: asked "
            f"{HfApi().endpoint} and got {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}. Check "
            "the name and the network (HF_ENDPOINT, HF_TOKEN), give a 40-digit commit as revision to plan without "
            "asking, or use a local directory or files"
        ) from None
    if commit is None:
        raise Refusal(f"the hub names no commit for the {kind} {name!r} at revision {revision or 'main'!r}")
    return str(commit)


def copy_to_parquet(source: HubSource, context: Context) -> list[SourceFile]:
    """Copy the text column into scratch_dir and return the Parquet files in row order, through context.map.

    A streamed dataset is divided by its own shards, one on disk into row ranges; max_documents makes it one share.
    """
    folder = context.scratch_dir / ("hub-streamed" if source.streaming else "hub-rows")
    folder.mkdir(parents=True, exist_ok=True)
    dataset = _load(source)
    shares = [
        _Share(share, source.text_column, source.dataset, folder / f"part-{number:05d}.parquet")
        for number, share in enumerate(_shares(dataset, source))
    ]
    results = map(_copy, shares) if len(shares) == 1 else context.map(_copy, shares)
    for done, _ in enumerate(results, start=1):
        context.progress(done, len(shares), "parts", phase="copying the dataset")
        if context.stop_requested:
            raise Interrupted(f"stopped after copying {done} of {len(shares)} parts of {source.dataset}; they are kept")
    return [SourceFile(share.target, "parquet", False) for share in shares]


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
        raise Refusal(
            f"source.dataset: {source.dataset!r} (config {source.config!r}, split {source.split!r}, "
            f"revision {source.revision!r}) could not be loaded: {type(error).__name__}: {error}{hint}"
        ) from None
    columns = dataset.column_names
    if columns is not None and source.text_column not in columns:
        raise Refusal(
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


def _copy(share: _Share) -> None:
    """Write one share unless an earlier attempt already has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if share.target.exists():
        return
    temporary = share.target.with_suffix(".tmp")
    schema = pa.schema([pa.field(share.column, pa.large_string())])
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for texts in _groups(_texts(share)):
            writer.write_table(pa.table([pa.array(texts, pa.large_string())], schema=schema))
    temporary.replace(share.target)


def _texts(share: _Share) -> Iterator[str | None]:
    for number, row in enumerate(share.dataset):
        if share.column not in row:
            raise Refusal(
                f"row {number} of the dataset {share.name!r} lacks the text column {missing_column(share.column, row)}"
            )
        text = row[share.column]
        if text is not None and not isinstance(text, str):
            raise Refusal(
                f"the dataset {share.name!r}: column {share.column!r} holds {str(text)[:60]!r} "
                f"({type(text).__name__}), expected text; set source.text_column"
            )
        # Half a surrogate pair is no character; Parquet holds UTF-8.
        yield None if text is None else text.encode("utf-8", errors="replace").decode("utf-8")


def _groups(texts: Iterable[str | None]) -> Iterator[list[str | None]]:
    group: list[str | None] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text or "")
        if size >= _ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
