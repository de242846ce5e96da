"""The two passes over a unit of the corpus that run in parallel: hash its documents, then encode them.

Both are plain functions of picklable values. A unit's result does not depend on which process computes it or on what
other units exist, so the output of the stage is the same for every number of workers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.contract import Refusal
from stages.documents import Layout, Part, Piece, read_pieces
from stages.shards import DOCUMENTS_SCHEMA, ShardWriter, write_documents
from stages.split import BOTH, DIGEST_DTYPE, SKIP, TRAIN, VALIDATION, divide_tail

SPLITS = {TRAIN: "train", VALIDATION: "validation"}
# Text handed to the tokenizer at once, two of the longest pieces. Its encodings take about 350 bytes a token: 240 MB.
_BATCH_CHARACTERS = 2_000_000

Report = Callable[[int, int], None]  # (bytes done, tokens done) of a unit so far


@dataclass(frozen=True)
class PartScan:
    """digests: S32 [rows], sha256 of the text. sizes: int64 [rows], UTF-8 bytes, 0 = no text but white space."""

    rows: int
    digests: npt.NDArray[np.bytes_]
    sizes: npt.NDArray[np.int64]
    invalid_bytes: int


@dataclass(frozen=True)
class Coder:
    """How text becomes ids: a tokenizer.json, the id appended to each document, ids below num_ids, their dtype."""

    tokenizer_json: Path
    eos_id: int
    eos_token: str
    num_ids: int
    token_dtype: str


@dataclass(frozen=True)
class EncodeTask:
    """One unit to encode. sides: uint8 [rows of the unit] of stages.split; sizes: int64 [rows], UTF-8 bytes."""

    unit: tuple[Part, ...]
    number: int
    layout: Layout
    first_row: int
    sides: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]
    validation_fraction: float
    coder: Coder
    shard_bytes: int
    directory: Path
    parent_pid: int


@dataclass
class EncodedSplit:
    """What a unit added to one split. documents_file: rows of DOCUMENTS_SCHEMA with `start` counted from the unit."""

    shards: list[Path]
    documents_file: Path
    documents: int
    tokens: int
    bytes: int


@dataclass
class EncodedUnit:
    """splits by name; token_counts: int64 [num_ids], training split with EOS; eos_in_text: times it is spelt out."""

    splits: dict[str, EncodedSplit]
    token_counts: npt.NDArray[np.int64]
    eos_in_text: int


def scan_unit(task: tuple[tuple[Part, ...], Layout, bool]) -> list[PartScan]:
    """Hash the documents of each part of a unit. The last item says whether bytes that are not UTF-8 are refused."""
    unit, layout, refuse_invalid = task
    return [_scan_part(part, layout, refuse_invalid) for part in unit]


def _scan_part(part: Part, layout: Layout, refuse_invalid: bool) -> PartScan:
    digests: list[bytes] = []
    sizes: list[int] = []
    invalid = 0
    digest, size, blank = hashlib.sha256(), 0, True
    for piece in read_pieces(part, layout):
        data = piece.text.encode()
        digest.update(data)
        size += len(data)
        blank = blank and (not piece.text or piece.text.isspace())
        invalid += piece.invalid_bytes
        if invalid and refuse_invalid:
            raise Refusal(
                f"{str(part.file.path)!r} holds bytes that are not UTF-8 (row {len(sizes)} of this part) and "
                "tokenize.invalid_utf8 is refuse; convert the file, or set it to replace"
            )
        if piece.ends_document:
            digests.append(digest.digest())
            sizes.append(0 if blank else size)
            digest, size, blank = hashlib.sha256(), 0, True
    return PartScan(len(sizes), np.array(digests, DIGEST_DTYPE), np.array(sizes, np.int64), invalid)


def training_texts(
    units: list[tuple[Part, ...]],
    layout: Layout,
    sides: npt.NDArray[np.uint8],
    sizes: npt.NDArray[np.int64],
    validation_fraction: float,
) -> Iterator[str]:
    """The training text of the whole corpus, piece by piece, in order."""
    row = 0
    for part in (part for unit in units for part in unit):
        for document in _documents(read_pieces(part, layout)):
            for side, piece in _sided(document, sides[row], sizes[row], validation_fraction):
                if side == TRAIN:
                    yield piece
            row += 1


def encode_unit(task: EncodeTask, report: Report | None = None) -> EncodedUnit:
    """Encode the documents of a unit and write its shards and document rows below task.directory."""
    from tokenizers import Tokenizer

    if os.getpid() != task.parent_pid:
        # Other units are encoded beside this one: one thread each, and no warning about forks.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(task.coder.tokenizer_json))
    tokenizer.encode_special_tokens = True
    writers = {side: _SplitWriter(task, side) for side in SPLITS}
    token_counts = np.zeros(task.coder.num_ids, dtype=np.int64)
    eos_in_text = 0
    done_bytes = done_tokens = 0
    for batch in _batches(_task_pieces(task)):
        training: list[npt.NDArray[np.uint32]] = []
        for piece, ids in zip(batch, _encoded(tokenizer, batch), strict=True):
            tokens = np.append(ids, np.uint32(task.coder.eos_id)) if piece.ends_document else ids
            writers[piece.side].append(tokens, piece)
            if piece.side == TRAIN:
                training.append(tokens)
            eos_in_text += piece.text.count(task.coder.eos_token)
            done_bytes += piece.bytes
            done_tokens += len(tokens)
        if training:
            token_counts += np.bincount(np.concatenate(training), minlength=task.coder.num_ids)
        if report is not None:
            report(done_bytes, done_tokens)
    return EncodedUnit({SPLITS[side]: writer.close() for side, writer in writers.items()}, token_counts, eos_in_text)


def _encoded(tokenizer: Any, batch: list[_SidedPiece]) -> list[npt.NDArray[np.uint32]]:
    # In a function of its own, so that the encodings are gone before the next batch makes its own.
    encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


@dataclass(frozen=True)
class _SidedPiece:
    """Text that goes to one side of the split, the end of a document there or not."""

    text: str
    side: int
    row: int
    ends_document: bool
    bytes: int


@dataclass
class _SplitWriter:
    """One unit's tokens and document rows of one split."""

    task: EncodeTask
    side: int
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stem = f"unit-{self.task.number:06d}-{SPLITS[self.side]}"
        self.writer = ShardWriter(self.task.directory, self.stem, self.task.coder.token_dtype, self.task.shard_bytes)
        self.start = self.size = 0

    def append(self, tokens: npt.NDArray[np.uint32], piece: _SidedPiece) -> None:
        self.writer.append(tokens)
        self.size += piece.bytes
        if piece.ends_document:
            self.starts.append(self.start)
            self.lengths.append(self.writer.num_tokens - self.start)
            self.rows.append(self.task.first_row + piece.row)
            self.sizes.append(self.size)
            self.start, self.size = self.writer.num_tokens, 0

    def close(self) -> EncodedSplit:
        import pyarrow as pa

        shards = self.writer.close()
        columns = [pa.array(column, pa.int64()) for column in (self.starts, self.lengths, self.rows, self.sizes)]
        documents_file = self.task.directory / f"{self.stem}-documents.arrow"
        write_documents(documents_file, [pa.table(columns, schema=DOCUMENTS_SCHEMA)])
        return EncodedSplit(shards, documents_file, len(self.rows), self.writer.num_tokens, sum(self.sizes))


def _task_pieces(task: EncodeTask) -> Iterator[_SidedPiece]:
    row = 0
    for part in task.unit:
        for document in _documents(read_pieces(part, task.layout)):
            waiting: _SidedPiece | None = None  # the last piece of a side is known when the next one comes
            for side, text in _sided(document, task.sides[row], task.sizes[row], task.validation_fraction):
                if waiting is not None:
                    yield _SidedPiece(waiting.text, waiting.side, row, waiting.side != side, waiting.bytes)
                waiting = _SidedPiece(text, side, row, True, len(text.encode()))
            if waiting is not None:
                yield waiting
            row += 1


def _documents(pieces: Iterator[Piece]) -> Iterator[Iterator[Piece]]:
    """Group pieces by document; each group must be used up before the next is asked for."""

    def rest_of(piece: Piece) -> Iterator[Piece]:
        yield piece
        while not piece.ends_document:
            piece = next(pieces)
            yield piece

    for first in pieces:
        yield rest_of(first)


def _sided(document: Iterator[Piece], side: int, size: int, fraction: float) -> Iterator[tuple[int, str]]:
    if side == BOTH:
        for part_side, data in divide_tail((piece.text.encode() for piece in document), int(size), fraction):
            yield part_side, data.decode()
        return
    for piece in document:
        if side != SKIP:
            yield int(side), piece.text


def _batches(pieces: Iterator[_SidedPiece]) -> Iterator[list[_SidedPiece]]:
    batch: list[_SidedPiece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
