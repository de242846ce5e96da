"""Reading documents: a part of a corpus in, pieces of text out, in memory that does not depend on any size.

A corpus is a list of files; a file is cut into *parts* that can be read on their own (a jsonl file at line starts, a
Parquet file at row groups), and neighbouring parts form *units* of work. A document comes as one or more *pieces*:
those of more than PIECE_BYTES are cut, so that a book of 10 GB is read, hashed and encoded in pieces of 1 MiB.

Where a document is cut depends on its own bytes alone, never on chunks, parts or workers. The first choice is between
an ASCII letter or digit and a line break: no byte-level BPE in use (the GPT-2, GPT-4 and Llama 3 patterns) joins those
two into one token, so the pieces' tokens are the whole document's tokens. A tokenizer that marks the beginning of a
text (a SentencePiece dummy prefix) marks the beginning of every piece; `tokenization` warns when that happens.

Text is taken as it is: nothing is stripped or normalised, CRLF stays CRLF; only a byte order mark is left out. Rows
that are null, and blank lines of jsonl files, hold no document.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lazypipe.stages.data.rows import decode_utf8, jsonl_rows, parquet_row_groups, parquet_rows
from lazypipe.stages.data.source_files import READ_BYTES, SourceFile, open_text_bytes

PIECE_BYTES = 2**20
# Each finds the last place of its kind in a window; tried in this order.
_CUTS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (rb".*[A-Za-z0-9](?=\r?\n)", rb".*\S(?=\r?\n)", rb".*[A-Za-z0-9](?= )", rb".+(?=\n)")
)


class Piece(NamedTuple):
    """Consecutive text of one document. invalid_bytes were not UTF-8 and became U+FFFD."""

    text: str
    ends_document: bool
    invalid_bytes: int


@dataclass(frozen=True)
class Part:
    """A share of a file: bytes [start, end) of a text or jsonl file, or row groups [start, end) of a Parquet file.

    A line belongs to the part in which it starts. size: bytes of text, an estimate used to balance units.
    """

    file: SourceFile
    start: int
    end: int | None
    size: int


@dataclass(frozen=True)
class Layout:
    """Where documents are in files: the text column of rows, and what separates documents in a text file."""

    text_column: str = "text"
    document_separator: str | None = None


def plan_units(files: Iterable[tuple[SourceFile, int]], layout: Layout, unit_bytes: int) -> list[tuple[Part, ...]]:
    """Cut (file, bytes of text) pairs into parts and group neighbours into units of about unit_bytes, in order."""
    units: list[tuple[Part, ...]] = []
    unit: list[Part] = []
    size = 0
    for part in (part for file, text_bytes in files for part in _parts(file, text_bytes, layout, unit_bytes)):
        if unit and size + part.size > unit_bytes:
            units.append(tuple(unit))
            unit, size = [], 0
        unit.append(part)
        size += part.size
    return [*units, tuple(unit)] if unit else units


def read_pieces(part: Part, layout: Layout, piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    """The rows of a part in order, each as one piece or more; a row without text is one empty piece.

    UserError for a jsonl line that is not an object with text in the text column.
    """
    if part.file.format == "text":
        with open_text_bytes(part.file) as stream:
            separator = (layout.document_separator or "").encode()
            for data, last in split_text(stream.read, separator, piece_bytes):
                text, invalid = decode_utf8(data)
                yield Piece(text, last, invalid)
        return
    if part.file.format == "jsonl":
        rows = jsonl_rows(part.file, part.start, part.end, layout.text_column)
    else:
        rows = parquet_rows(part.file, range(part.start, part.end or 0), layout.text_column)
    for row, invalid_in_row in rows:
        for data, last in cut_into_pieces(row, piece_bytes):
            text, invalid = decode_utf8(data)
            yield Piece(text, last, invalid + (invalid_in_row if last else 0))


def cut_into_pieces(data: bytes, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[bytes, bool]]:
    """(piece, is the last) of one document; at least one piece, each of at most piece_bytes."""
    start = 0
    while len(data) - start > piece_bytes:
        cut = _cut_position(data, start, piece_bytes)
        yield data[start:cut], False
        start = cut
    yield data[start:] if start else data, True


def _cut_position(data: bytes, start: int, piece_bytes: int) -> int:
    """Where the piece that begins at `start` ends; more than piece_bytes bytes follow `start`."""
    limit = start + piece_bytes
    for pattern in _CUTS:
        found = pattern.match(data, start, limit)
        if found is not None:
            return found.end()
    cut = limit
    while cut > limit - 3 and data[cut] & 0xC0 == 0x80:  # a continuation byte: do not cut a character
        cut -= 1
    return cut


def split_text(read: Callable[[int], bytes], separator: bytes, piece_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """(piece, ends its document) of a text stream; an empty separator makes the stream one document.

    What follows the last separator is a document too, unless it is empty. At most about two pieces are in memory.
    """
    data = read(READ_BYTES).removeprefix(BOM_UTF8)
    start = 0  # of the present piece
    searched = 0  # no separator begins before this
    separated = False
    at_end = False
    while True:
        end = data.find(separator, searched) if separator else -1
        if end >= 0:
            yield from cut_into_pieces(data[start:end], piece_bytes)
            start = searched = end + len(separator)
            separated = True
        elif len(data) - start > piece_bytes + len(separator):
            # With that much in sight and no separator in it, none begins inside the next piece.
            cut = _cut_position(data, start, piece_bytes)
            yield data[start:cut], False
            start = cut
            searched = max(start, len(data) - len(separator) + 1)
        elif not at_end:
            chunk = read(READ_BYTES)
            at_end = not chunk
            searched = max(0, len(data) - len(separator) + 1 - start)
            data = data[start:] + chunk
            start = 0
        else:
            break
    if start < len(data) or not separated:
        yield from cut_into_pieces(data[start:], piece_bytes)


def _parts(file: SourceFile, text_bytes: int, layout: Layout, unit_bytes: int) -> Iterator[Part]:
    if file.format == "parquet":
        for group, size in enumerate(parquet_row_groups(file, layout.text_column)):
            yield Part(file, group, group + 1, size)
    elif file.format == "jsonl" and not file.gzip:
        for start in range(0, max(text_bytes, 1), unit_bytes):
            end = min(start + unit_bytes, text_bytes)
            yield Part(file, start, end, end - start)
    else:
        yield Part(file, 0, None, text_bytes)
