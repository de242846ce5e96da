"""What planning needs to know about a corpus, before and without computing anything.

`pin` makes a config mean the same in every process, `source_identity` says what enters the fingerprint, and
`check_source` refuses what cannot work. All three read files once and remember what they saw in a cache directory; for
text and jsonl they import only the standard library.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazypipe.stages.contract import UserError
from lazypipe.stages.data.source_files import (
    FileFacts,
    SourceFile,
    absolute_patterns,
    file_facts,
    looks_like_a_path,
    open_text_bytes,
    source_files,
)
from lazypipe.stages.data.sources import HubSource
from lazypipe.stages.tokenization.config import FileTokenizer, HubTokenizer, TokenizeConfig

# Rows of each jsonl file that are parsed while planning; the rest is checked when it is read.
_ROWS_CHECKED = 16
_BYTE_ORDER_MARKS = {  # the first that fits decides: a UTF-32 mark begins like one of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class SourceSummary:
    """files and bytes of text (decompressed; columns other than the text included); 0 for a hub dataset."""

    files: int
    bytes: int
    max_tokens: int | None


def pin(config: TokenizeConfig, base: Path | None = None) -> TokenizeConfig:
    """The same config with absolute paths (relative ones are below `base`, default: the working directory) and hub
    revisions resolved to commits, so that a worker anywhere reads what was planned. Changes no fingerprint.
    """
    from lazypipe.stages.data.hub import resolve_commit

    base = (base or Path.cwd()).absolute()
    source: Any = config.source
    tokenizer: Any = config.tokenizer
    if source.kind == "files":
        source = source.model_copy(update={"paths": absolute_patterns(source.paths, base)})
    elif source.kind == "hub" and not _is_directory(source.dataset, "source.dataset"):
        commit = resolve_commit("dataset", source.dataset, source.revision)
        source = source.model_copy(update={"revision": commit})
    if isinstance(tokenizer, FileTokenizer):
        tokenizer = tokenizer.model_copy(update={"path": absolute_patterns([tokenizer.path], base)[0]})
    elif isinstance(tokenizer, HubTokenizer) and not _is_directory(tokenizer.name, "tokenizer.name"):
        commit = resolve_commit("model", tokenizer.name, tokenizer.revision)
        tokenizer = tokenizer.model_copy(update={"revision": commit})
    return config.model_copy(update={"source": source, "tokenizer": tokenizer})


def _is_directory(name: str, key: str) -> bool:
    """Whether a hub name is a local directory; a path to nothing is refused instead of looked for on the hub."""
    if Path(name).is_dir():
        return True
    if looks_like_a_path(name):
        raise UserError(f"{key}: there is no such directory: {name!r}; correct the path, or give a name on the hub")
    return False


def source_identity(config: TokenizeConfig, cache_dir: Path | None) -> dict[str, Any]:
    """What of source and tokenizer enters the fingerprint besides the config: contents and commits, never paths.

    Files: [{"format", "sha256"}] in the order they are read. A hub dataset: its commit, or for a local directory the
    hash of its files. cache_dir/file_hashes.json keeps hashes by path, size and mtime. Raises UserError.
    """
    from lazypipe.stages.tokenization.tokenizer import directory_sha256, tokenizer_identity

    source = config.source
    identity: dict[str, Any]
    if isinstance(source, HubSource):
        if (folder := Path(source.dataset)).is_dir():
            identity = {"directory": directory_sha256(folder, ["**/*"])}
        else:
            from lazypipe.stages.data.hub import resolve_commit

            identity = {"commit": resolve_commit("dataset", source.dataset, source.revision)}
    else:
        files = source_files(source)
        facts = file_facts(files, cache_dir)
        identity = {
            "files": [{"format": f.format, "sha256": found.sha256} for f, found in zip(files, facts, strict=True)]
        }
    return {"source": identity, "tokenizer": tokenizer_identity(config.tokenizer)}


def corpus_fingerprint(config: TokenizeConfig, identity: dict[str, Any]) -> str:
    """sha256 (hex) of the corpus: its content and how documents are found in it; not the tokenizer."""
    source = config.source.model_dump(mode="json", exclude={"paths", "streaming", "revision"})
    recipe = {"source": source, "identity": identity["source"]}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def check_source(config: TokenizeConfig, cache_dir: Path | None, *, min_tokens: int = 0) -> SourceSummary:
    """Refuse every source and tokenizer that is known to fail, in the order a reader would meet the problems.

    min_tokens: refuse a corpus that cannot have so many, for no tokenizer makes more tokens than there are bytes, with
    one EOS per document. Hub datasets are checked when they are loaded.
    """
    from lazypipe.stages.tokenization.tokenizer import check_tokenizer

    check_tokenizer(config.tokenizer, config.token_dtype)
    if isinstance(config.source, HubSource):
        return SourceSummary(files=0, bytes=0, max_tokens=None)
    files = source_files(config.source)
    facts = list(file_facts(files, cache_dir))
    if all(found.blank for found in facts):
        raise UserError(f"the corpus is empty: no text in {_names(files)}; give files that hold text")
    _refuse_other_encodings(files, facts)
    if config.invalid_utf8 == "refuse":
        _refuse_invalid_utf8(files, facts)
    column = getattr(config.source, "text_column", "text")
    for file in files:
        _check_rows(file, column)
    if all(found.blank or _without_rows(file) for file, found in zip(files, facts, strict=True)):
        raise UserError(f"the corpus is empty: no row of text in {_names(files)}; give files that hold text")
    size = sum(found.text_bytes for found in facts)
    max_tokens = None
    # A Parquet file may hold more text than bytes (repeated values are stored once), so it bounds nothing.
    if not any(file.format == "parquet" for file in files):
        max_tokens = size + len(files)
        if max_tokens < min_tokens:
            raise UserError(
                f"the corpus is too small: {_names(files)} hold {size} bytes, at most {max_tokens} tokens, but "
                f"{min_tokens} are needed; give more text or lower seq_len"
            )
    return SourceSummary(len(files), size, max_tokens)


def _check_rows(file: SourceFile, column: str) -> None:
    if file.format == "jsonl":
        from lazypipe.stages.data.rows import jsonl_rows

        for _ in itertools.islice(jsonl_rows(file, 0, None, column), _ROWS_CHECKED):
            pass
    elif file.format == "parquet":
        from lazypipe.stages.data.rows import missing_column, parquet_text_columns

        columns = parquet_text_columns(file.path)
        if column not in columns:
            raise UserError(f"{str(file.path)!r} lacks the text column {missing_column(column, columns)}")
        if not columns[column]:
            others = ", ".join(repr(name) for name, text in columns.items() if text)
            remedy = (
                f"set source.text_column to one of {others}"
                if others
                else "nor does any other column; write the file with one that does"
            )
            raise UserError(
                f"{str(file.path)!r}: column {column!r} holds no text (its type is not string or binary); {remedy}"
            )


def _without_rows(file: SourceFile) -> bool:
    """Whether the footer of a Parquet file says so; any other file is blank then."""
    if file.format != "parquet":
        return False
    from lazypipe.stages.data.rows import parquet_row_count

    return parquet_row_count(file) == 0


def _refuse_other_encodings(files: Iterable[SourceFile], facts: Iterable[FileFacts]) -> None:
    """Refuse text that begins with another encoding's byte order mark: read as UTF-8 it is half NUL characters."""
    for file, found in zip(files, facts, strict=True):
        if found.invalid_utf8_at != 0:  # all these marks begin with FF or FE, which UTF-8 never holds
            continue
        with open_text_bytes(file) as stream:
            start = stream.read(4)
        for mark, encoding in _BYTE_ORDER_MARKS.items():
            if start.startswith(mark):
                raise UserError(
                    f"{str(file.path)!r} is {encoding} text (it begins with the bytes {mark.hex(' ').upper()}), "
                    f"expected UTF-8; convert it with `iconv -f {encoding} -t UTF-8`"
                )


def _refuse_invalid_utf8(files: Iterable[SourceFile], facts: Iterable[FileFacts]) -> None:
    for file, found in zip(files, facts, strict=True):
        if found.invalid_utf8_at is not None:
            raise UserError(
                f"{str(file.path)!r} is not UTF-8 at byte {found.invalid_utf8_at} and tokenize.invalid_utf8 is refuse; "
                "convert the file, or set it to replace"
            )


def _names(files: list[SourceFile]) -> str:
    names = [str(file.path) for file in files[:3]]
    return ", ".join(names) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
