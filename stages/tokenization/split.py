"""Which documents are held out for validation: a function of their text alone.

Documents are taken in order of the sha256 of their text until validation_fraction of all bytes is reached. Adding
files, reordering them or reading them in other parts moves no document for any other reason, and copies of one text
are always on the same side. Documents are never divided, with one exception: a corpus with a single distinct text is
cut near its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lazypipe.stages.contract import UserError

SKIP, TRAIN, VALIDATION, BOTH = range(4)
DIGEST_DTYPE = np.dtype("S32")
_TOO_SHORT = "the corpus is a single character; training and validation need text each, so give more text"


@dataclass(frozen=True)
class Split:
    """sides: uint8 [rows], one of SKIP (no text), TRAIN, VALIDATION, BOTH (head trains, tail validates)."""

    sides: npt.NDArray[np.uint8]
    validation_bytes: int


def choose_validation(
    digests: npt.NDArray[np.bytes_], sizes: npt.NDArray[np.int64], validation_fraction: float
) -> Split:
    """Assign every row by its text's sha256 (S32 [rows]) and UTF-8 size in bytes (int64 [rows]; 0 = no text).

    At least one distinct text is on each side. UserError when there is no text, or a single byte of it.
    """
    sides = np.full(len(sizes), SKIP, dtype=np.uint8)
    rows = np.flatnonzero(sizes)
    if not len(rows):
        raise UserError("the corpus is empty: no document holds any text; check source and source.text_column")
    order = rows[np.argsort(digests[rows], kind="stable")]
    sorted_digests = digests[order]
    text_starts = np.flatnonzero(np.concatenate([[True], sorted_digests[1:] != sorted_digests[:-1]]))
    cumulative = np.cumsum(np.add.reduceat(sizes[order], text_starts))
    target = validation_fraction * float(cumulative[-1])
    if len(text_starts) == 1:
        if sizes[order[0]] < 2:
            raise UserError(_TOO_SHORT)
        sides[rows] = BOTH
        return Split(sides, max(1, round(target)))
    taken = min(int(np.searchsorted(cumulative, target, side="left")) + 1, len(text_starts) - 1)
    sides[rows] = TRAIN
    sides[order[: text_starts[taken]]] = VALIDATION
    return Split(sides, int(cumulative[taken - 1]))


def divide_tail(pieces: Iterable[bytes], size: int, validation_fraction: float) -> Iterator[tuple[int, bytes]]:
    """(TRAIN or VALIDATION, bytes) of the one document whose UTF-8 pieces have `size` bytes together.

    The tail has about validation_fraction of the bytes, up to twice that when it can then begin after a line break,
    and begins at a character. UserError when the document is a single character.
    """
    tail = min(size - 1, max(1, round(validation_fraction * size)))
    earliest, latest = max(1, size - 2 * tail), size - tail
    offset = 0
    for data in pieces:
        if offset + len(data) <= latest:
            yield TRAIN, data
        elif offset >= latest:
            yield VALIDATION, data
        else:
            cut = _tail_position(data, max(0, earliest - offset), latest - offset, at_start=offset == 0)
            if cut == size:
                raise UserError(_TOO_SHORT)
            if cut:
                yield TRAIN, data[:cut]
            yield VALIDATION, data[cut:]
        offset += len(data)


def _tail_position(data: bytes, earliest: int, latest: int, at_start: bool) -> int:
    line_break = data.rfind(b"\n", max(0, earliest - 1), latest)
    if line_break >= 0:
        return line_break + 1
    cut = latest
    while cut > 0 and data[cut] & 0xC0 == 0x80:  # a continuation byte: not inside a character
        cut -= 1
    if cut == 0 and at_start:
        cut = 1
        while cut < len(data) and data[cut] & 0xC0 == 0x80:
            cut += 1
    return cut
