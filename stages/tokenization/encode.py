"""The last pass over a unit of the corpus: encode its documents to final shards.

A plain function of picklable values. A unit's result does not depend on which process computes it or on what other
units exist, so the output of the stage is the same for every number of workers. A finished unit is kept
(stages/kept_work.py): the attempt after a crash finds it whole, or encodes it again.

    <folder>/<name>/   train-00000.arrow ...  train-documents.arrow   validation the same   token_counts.npy
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lazypipe.stages.data.shards import DOCUMENTS_SCHEMA, ShardWriter, write_documents
from lazypipe.stages.kept_work import keep, kept
from lazypipe.stages.tokenization.documents import Layout, Part, Piece, read_pieces
from lazypipe.stages.tokenization.split import BOTH, SKIP, TRAIN, VALIDATION, divide_tail

SPLITS = {TRAIN: "train", VALIDATION: "validation"}
# Text handed to the tokenizer at once; its encodings take about 350 bytes a token until the batch is written. With one
# thread no size from 2^13 on was faster than another; with several they need documents to share.
_BATCH_CHARACTERS, _THREADED_BATCH_CHARACTERS = 2**18, 2**20
_TOKEN_COUNTS = "token_counts.npy"

Report = Callable[[int, int], None]  # (bytes done, tokens done) of a unit so far


@dataclass(frozen=True)
class Coder:
    """How text becomes ids: a tokenizer.json, the id appended to each document, ids below num_ids, their dtype."""

    tokenizer_json: Path
    sha256: str
    eos_id: int
    eos_token: str
    num_ids: int
    token_dtype: str


@dataclass(frozen=True)
class EncodeTask:
    """One unit to encode, kept as folder/name under `key`. sides: uint8 [rows of the unit] of split.py; sizes:
    int64 [rows], UTF-8 bytes."""

    unit: tuple[Part, ...]
    layout: Layout
    first_row: int
    sides: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]
    validation_fraction: float
    coder: Coder
    shard_bytes: int
    folder: Path
    name: str
    key: str
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
    """splits by name; token_counts: int64 [num_ids], training split with EOS; eos_in_text: times it is spelt out.

    resumed: taken from an earlier attempt. problem: why what an earlier attempt kept could not be.
    """

    splits: dict[str, EncodedSplit]
    token_counts: npt.NDArray[np.int64]
    eos_in_text: int
    resumed: bool
    problem: str | None


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
    """Encode the documents of a unit and write its shards and document rows, unless an earlier attempt has."""
    target = task.folder / task.name
    earlier = kept(target, task.key)
    facts = earlier.facts or keep(target, task.key, lambda directory: _write_unit(task, directory, report))
    splits = {
        name: EncodedSplit(
            [target / shard for shard in split["shards"]],
            target / _documents_file(name),
            split["documents"],
            split["tokens"],
            split["bytes"],
        )
        for name, split in facts["splits"].items()
    }
    counts = np.load(target / _TOKEN_COUNTS)
    return EncodedUnit(splits, counts, facts["eos_in_text"], earlier.facts is not None, earlier.problem)


def _write_unit(task: EncodeTask, directory: Path, report: Report | None) -> dict[str, Any]:
    if os.getpid() != task.parent_pid:
        # Other units are encoded beside this one: one thread each, and no warning about forks.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = _encoder(task.coder)
    batch_characters = _BATCH_CHARACTERS if os.getpid() != task.parent_pid else _THREADED_BATCH_CHARACTERS
    writers = {side: _SplitWriter(task, side, directory) for side in SPLITS}
    token_counts = np.zeros(task.coder.num_ids, dtype=np.int64)
    eos_in_text = 0
    done_bytes = done_tokens = 0
    for batch in _batches(_task_pieces(task), batch_characters):
        tokens = _encoded(tokenizer, batch, task.coder.eos_id, writers)
        for side, ids in tokens.items():
            writers[side].append(ids)
            done_tokens += len(ids)
        token_counts += np.bincount(tokens[TRAIN], minlength=task.coder.num_ids)
        eos_in_text += sum(piece.text.count(task.coder.eos_token) for piece in batch)
        done_bytes += sum(piece.bytes for piece in batch)
        if report is not None:
            report(done_bytes, done_tokens)
    np.save(directory / _TOKEN_COUNTS, token_counts)
    return {"splits": {SPLITS[side]: writer.close() for side, writer in writers.items()}, "eos_in_text": eos_in_text}


_encoders: dict[str, Any] = {}  # by sha256, one at most


def _encoder(coder: Coder) -> Any:
    """The process's encoder, kept from unit to unit: its word cache ends at 10,000 words, so it does not grow.

    With a new one for each unit a process slows down, by 28 % over 14 units of 4 MB, and grows: every word cache is
    built in a heap full of the holes of those before.
    """
    from tokenizers import Tokenizer

    if coder.sha256 not in _encoders:
        _encoders.clear()
        tokenizer: Any = Tokenizer.from_file(str(coder.tokenizer_json))
        tokenizer.encode_special_tokens = True
        _encoders[coder.sha256] = tokenizer
    return _encoders[coder.sha256]


def _encoded(
    tokenizer: Any, batch: list[_SidedPiece], eos_id: int, writers: dict[int, _SplitWriter]
) -> dict[int, npt.NDArray[np.uint32]]:
    """The tokens of a batch by side, ends of documents told to the writers.

    In a function of its own, so that the encodings are gone before the next batch makes its own. array.fromlist takes
    4 ns a token, np.array(list) 39.
    """
    tokens = {side: array("I") for side in writers}
    encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
    for piece, encoding in zip(batch, encodings, strict=True):
        flat = tokens[piece.side]
        before = len(flat)
        flat.fromlist(encoding.ids)
        if piece.ends_document:
            flat.append(eos_id)
        writers[piece.side].add_piece(len(flat) - before, piece)
    return {side: np.frombuffer(flat, dtype=np.uint32) for side, flat in tokens.items()}


@dataclass(frozen=True, slots=True)
class _SidedPiece:
    """Text that goes to one side of the split, the end of a document there or not."""

    text: str
    side: int
    row: int
    ends_document: bool
    bytes: int


def _integers() -> array[int]:
    return array("q")


@dataclass
class _SplitWriter:
    """One unit's tokens and document rows of one split."""

    task: EncodeTask
    side: int
    directory: Path
    starts: array[int] = field(default_factory=_integers)
    lengths: array[int] = field(default_factory=_integers)
    rows: array[int] = field(default_factory=_integers)
    sizes: array[int] = field(default_factory=_integers)

    def __post_init__(self) -> None:
        self.name = SPLITS[self.side]
        self.writer = ShardWriter(self.directory, self.name, self.task.coder.token_dtype, self.task.shard_bytes)
        self.start = self.position = self.size = 0

    def add_piece(self, num_tokens: int, piece: _SidedPiece) -> None:
        """Note that the next num_tokens tokens are those of `piece`, EOS included."""
        self.position += num_tokens
        self.size += piece.bytes
        if piece.ends_document:
            self.starts.append(self.start)
            self.lengths.append(self.position - self.start)
            self.rows.append(self.task.first_row + piece.row)
            self.sizes.append(self.size)
            self.start, self.size = self.position, 0

    def append(self, tokens: npt.NDArray[np.uint32]) -> None:
        self.writer.append(tokens)

    def close(self) -> dict[str, Any]:
        import pyarrow as pa

        shards = self.writer.close()
        columns = [
            pa.array(np.frombuffer(column, dtype=np.int64))
            for column in (self.starts, self.lengths, self.rows, self.sizes)
        ]
        write_documents(self.directory / _documents_file(self.name), [pa.table(columns, schema=DOCUMENTS_SCHEMA)])
        return {
            "shards": [path.name for path in shards],
            "documents": len(self.rows),
            "tokens": self.writer.num_tokens,
            "bytes": sum(self.sizes),
        }


def _documents_file(split: str) -> str:
    return f"{split}-documents.arrow"


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


def _batches(pieces: Iterator[_SidedPiece], batch_characters: int) -> Iterator[list[_SidedPiece]]:
    batch: list[_SidedPiece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= batch_characters:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
