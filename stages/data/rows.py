"""Rows of jsonl and Parquet files, as UTF-8 text."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lazypipe.stages.contract import UserError, closest, first_line
from lazypipe.stages.data.remote import open_arrow
from lazypipe.stages.data.source_files import READ_BYTES, SourceFile, open_text_bytes


def decode_utf8(data: bytes) -> tuple[str, int]:
    """Text with U+FFFD for what is not UTF-8, and the number of bytes that were not."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        valid = data.decode("utf-8", errors="ignore")
        return data.decode("utf-8", errors="replace"), len(data) - len(valid.encode("utf-8"))


def jsonl_rows(file: SourceFile, start: int, end: int | None, column: str) -> Iterator[tuple[bytes, int]]:
    """(text as UTF-8, bytes that were not UTF-8) of each line that begins in bytes [start, end); null is empty text.

    Blank lines are no rows. UserError, with file:line, for a line that is not an object with text in `column`.
    """
    with open_text_bytes(file) as stream:
        position = start
        if start:
            stream.seek(start - 1)
            position += len(stream.readline()) - 1  # passes over the line that began before `start`
        while (end is None or position < end) and (line := stream.readline()):
            content = line.removeprefix(BOM_UTF8) if position == 0 else line
            if content.strip():
                yield _text_of_line(content, column, file, position)
            position += len(line)


def _text_of_line(line: bytes, column: str, file: SourceFile, position: int) -> tuple[bytes, int]:
    decoded, invalid = decode_utf8(line)
    try:
        row = json.loads(decoded)
    except ValueError as error:
        raise UserError(
            f"{_place(file, position)} is not a JSON object ({error}); a jsonl file holds one object per line"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{_place(file, position)} is not a JSON object but {decoded.strip()[:60]!r}")
    if column not in row:
        raise UserError(f"{_place(file, position)} lacks the text column {missing_column(column, row)}")
    text = row[column]
    if text is None:
        return b"", invalid
    if not isinstance(text, str):
        raise UserError(
            f"{_place(file, position)}: column {column!r} holds {str(text)[:60]!r} ({type(text).__name__}), expected "
            "text; set source.text_column"
        )
    try:
        return text.encode("utf-8"), invalid
    except UnicodeEncodeError:  # "\ud800": half of a surrogate pair is valid JSON but no character
        data = text.encode("utf-8", errors="surrogatepass")
        return data, invalid


def missing_column(column: str, present: Iterable[str]) -> str:
    """The end of a sentence that says which column was wanted and which are there."""
    names = list(present)
    hint = "".join(f"; did you mean {close!r}?" for close in closest(column, names))
    return f"{column!r}; it has {', '.join(map(repr, names)) or 'no columns'}{hint} Set source.text_column"


def _place(file: SourceFile, position: int) -> str:
    """file:line of a byte position; only errors need the line, so only they count it."""
    line = 1
    with open_text_bytes(file) as stream:
        while position > 0 and (chunk := stream.read(min(READ_BYTES, position))):
            line += chunk.count(b"\n")
            position -= len(chunk)
    return f"{file.path}:{line}"


def parquet_rows(file: SourceFile, row_groups: Iterable[int], column: str) -> Iterator[tuple[bytes, int]]:
    """(text as stored, 0) of each row of the row groups; null is empty text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_arrow(file.path) as stream, pq.ParquetFile(stream) as parquet:
        # 128 rows at a time: a row may be a whole book.
        for batch in parquet.iter_batches(batch_size=128, row_groups=list(row_groups), columns=[column]):
            values = batch.column(0)
            if pa.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            # As bytes: a string column written by other tools is not always UTF-8, and Arrow does not check.
            for value in values.cast(pa.large_binary()).to_pylist():
                yield value or b"", 0


def parquet_row_groups(file: SourceFile, column: str) -> list[int]:
    """Uncompressed bytes of the text column in each row group; [0] for a file without rows."""
    import pyarrow.parquet as pq

    with open_arrow(file.path) as stream:
        metadata = pq.read_metadata(stream)
    sizes = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = map(group.column, range(group.num_columns))
        sizes.append(sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column))
    return sizes


def parquet_row_count(file: SourceFile) -> int:
    """Rows of a Parquet file, as its footer counts them."""
    import pyarrow.parquet as pq

    with open_arrow(file.path) as stream:
        return int(pq.read_metadata(stream).num_rows)


def parquet_text_columns(path: Path | str) -> dict[str, bool]:
    """Column names of a Parquet file -> whether the column holds text. UserError when it is no Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_arrow(path) as stream:
            schema = pq.read_schema(stream)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{str(path)!r} is not a readable Parquet file ({first_line(error)}); write it again") from None
    return {field.name: _is_text(field.type) for field in schema}


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(check(kind) for check in checks)
