"""Which documents are left out: too short ones, and exact copies. Counts are kept by reason.

Decided on the driver from sizes and hashes alone, in input order, so the result is the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lazypipe.stages.contract import UserError
from lazypipe.stages.tokenization.config import Filters

KEPT, TOO_SHORT, DUPLICATE = range(3)
FILTERS = {TOO_SHORT: "too_short", DUPLICATE: "duplicate"}


@dataclass(frozen=True)
class Filtered:
    """reasons: uint8 [rows], KEPT or why a document is left out. sizes: int64 [rows], 0 where there is nothing left."""

    reasons: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]


def filter_documents(
    config: Filters, digests: npt.NDArray[np.bytes_], sizes: npt.NDArray[np.int64], chars: npt.NDArray[np.int64]
) -> Filtered:
    """Apply the filters to rows given by sha256 (S32), UTF-8 bytes (0 = no text) and characters, all [rows].

    Of equal texts the first in input order stays. UserError when nothing is left of a corpus that held text.
    """
    reasons = np.full(len(sizes), KEPT, dtype=np.uint8)
    reasons[(sizes > 0) & (chars < config.min_chars)] = TOO_SHORT
    if config.exact_duplicates == "drop":
        rows = np.flatnonzero((sizes > 0) & (reasons == KEPT))
        order = rows[np.argsort(digests[rows], kind="stable")]  # stable: equal texts stay in input order
        reasons[order[1:][digests[order[1:]] == digests[order[:-1]]]] = DUPLICATE
    if sizes.any() and not sizes[reasons == KEPT].any():
        raise UserError(
            f"tokenize.filters.min_chars={config.min_chars}: all {np.count_nonzero(sizes)} documents are shorter (the "
            f"longest has {chars.max()} characters), so no text is left; lower it"
        )
    return Filtered(reasons, np.where(reasons == KEPT, sizes, 0))


def dropped_counts(reasons: npt.NDArray[np.uint8], sizes: npt.NDArray[np.int64]) -> dict[str, int]:
    """{too_short_documents, too_short_bytes, duplicate_documents, duplicate_bytes} of some rows; sizes unfiltered."""
    return dict(_counts(reasons, sizes))


def _counts(reasons: npt.NDArray[np.uint8], sizes: npt.NDArray[np.int64]) -> Iterator[tuple[str, int]]:
    for reason, name in FILTERS.items():
        dropped = reasons == reason
        yield f"{name}_documents", int(dropped.sum())
        yield f"{name}_bytes", int(sizes[dropped].sum())
