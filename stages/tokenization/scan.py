"""The first pass over a unit of the corpus: hash its documents. What it found is kept (stages/kept_work.py)."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lazypipe.stages.contract import UserError
from lazypipe.stages.kept_work import keep, kept
from lazypipe.stages.tokenization.documents import Layout, Part, read_pieces
from lazypipe.stages.tokenization.split import DIGEST_DTYPE

_ARRAYS = "documents.npz"


@dataclass(frozen=True)
class PartScan:
    """digests: S32 [rows], sha256 of the text. sizes, chars: int64 [rows], UTF-8 bytes (0 = no text but white space)
    and characters."""

    rows: int
    digests: npt.NDArray[np.bytes_]
    sizes: npt.NDArray[np.int64]
    chars: npt.NDArray[np.int64]
    invalid_bytes: int


@dataclass(frozen=True)
class ScanTask:
    """One unit to hash; its result is kept as folder/name under `key`."""

    unit: tuple[Part, ...]
    layout: Layout
    refuse_invalid: bool
    folder: Path
    name: str
    key: str


@dataclass(frozen=True)
class UnitScan:
    """parts: one scan per part. resumed: taken from an earlier attempt. problem: why its kept result was not."""

    parts: list[PartScan]
    resumed: bool
    problem: str | None


def scan_unit(task: ScanTask) -> UnitScan:
    """Hash the documents of each part of a unit, unless an earlier attempt has. UserError for bytes that are not UTF-8
    when the task says so."""
    target = task.folder / task.name
    earlier = kept(target, task.key)
    if earlier.facts is not None:
        return UnitScan(_load(target, earlier.facts), True, None)
    parts = [_scan_part(part, task.layout, task.refuse_invalid) for part in task.unit]

    def write(directory: Path) -> dict[str, Any]:
        digests, sizes, chars = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("digests", "sizes", "chars")
        )
        np.savez(directory / _ARRAYS, digests=digests, sizes=sizes, chars=chars)
        return {"rows": [part.rows for part in parts], "invalid_bytes": [part.invalid_bytes for part in parts]}

    keep(target, task.key, write)
    return UnitScan(parts, False, earlier.problem)


def _load(target: Path, facts: dict[str, Any]) -> list[PartScan]:
    parts = []
    start = 0
    with np.load(target / _ARRAYS) as arrays:
        digests, sizes, chars = arrays["digests"], arrays["sizes"], arrays["chars"]
    for rows, invalid in zip(facts["rows"], facts["invalid_bytes"], strict=True):
        here = slice(start, start + rows)
        parts.append(PartScan(rows, digests[here], sizes[here], chars[here], invalid))
        start += rows
    return parts


def _scan_part(part: Part, layout: Layout, refuse_invalid: bool) -> PartScan:
    # Packed as they come: as Python objects the hashes of a unit of short documents were larger than its text.
    digests, sizes, chars = bytearray(), array("q"), array("q")
    invalid = 0
    digest, size, length, blank = hashlib.sha256(), 0, 0, True
    for piece in read_pieces(part, layout):
        data = piece.text.encode()
        digest.update(data)
        size += len(data)
        length += len(piece.text)
        blank = blank and (not piece.text or piece.text.isspace())
        invalid += piece.invalid_bytes
        if invalid and refuse_invalid:
            raise UserError(
                f"{str(part.file.path)!r} holds bytes that are not UTF-8 (row {len(sizes)} of this part) and "
                "tokenize.invalid_utf8 is refuse; convert the file, or set it to replace"
            )
        if piece.ends_document:
            digests += digest.digest()
            sizes.append(0 if blank else size)
            chars.append(length)
            digest, size, length, blank = hashlib.sha256(), 0, 0, True
    return PartScan(
        len(sizes),
        np.frombuffer(bytes(digests), DIGEST_DTYPE),
        np.array(sizes, dtype=np.int64),
        np.array(chars, dtype=np.int64),
        invalid,
    )
