"""What tokenization reports: entropy, document lengths, what each file held, and what a user should look at."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.documents import Part
from stages.encoding import PartScan
from stages.split import Split

_FILES_NAMED = 5


def unigram_entropy(counts: npt.NDArray[np.int64]) -> float:
    """H = -sum p ln p in nats, p = counts / sum: the loss of a model that knows token frequencies and nothing else."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def length_histogram(bins: Mapping[str, Sequence[npt.NDArray[np.int64]]]) -> list[dict[str, int]]:
    """Rows {from_tokens, to_tokens, train_documents, validation_documents} over the bins that occur, in order.

    bins: per split, one int64 [LENGTH_BINS] array per unit; bin i = documents of 2^i ... 2^(i+1) - 1 tokens with EOS.
    """
    totals = {name: np.sum(np.stack(units), axis=0) for name, units in bins.items()}
    occupied = np.flatnonzero(sum(totals.values()))
    return [
        {"from_tokens": 2**i, "to_tokens": 2 ** (i + 1) - 1} | {f"{n}_documents": int(t[i]) for n, t in totals.items()}
        for i in range(int(occupied[0]), int(occupied[-1]) + 1)
    ]


def length_figure(histogram: Sequence[Mapping[str, int]]) -> Any:
    """A matplotlib figure of length_histogram's rows, the two splits stacked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(histogram))
    bottom = np.zeros(len(histogram))
    for name, color in (("train", "#4477aa"), ("validation", "#ee7733")):
        heights = np.array([row[f"{name}_documents"] for row in histogram])
        axes.bar(positions, heights, bottom=bottom, width=0.9, color=color, label=f"{name} ({heights.sum():,})")
        bottom += heights
    axes.set_xticks(positions, [_tokens(row["from_tokens"]) for row in histogram])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("document length in tokens: from this to below the next mark")
    axes.set_ylabel("documents")
    axes.set_title("Document lengths")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def source_rows(units: Sequence[tuple[Part, ...]], scans: Sequence[Sequence[PartScan]]) -> list[dict[str, Any]]:
    """One row per file: {file, first_row, rows, documents, bytes, invalid_utf8_bytes}; rows without text have no
    document. first_row locates `source_row` of the docs table.
    """
    files: dict[str, dict[str, Any]] = {}
    first_row = 0
    for unit, unit_scans in zip(units, scans, strict=True):
        for part, scan in zip(unit, unit_scans, strict=True):
            empty = {"file": str(part.file.path), "first_row": first_row}
            row = files.setdefault(
                str(part.file.path), empty | {"rows": 0, "documents": 0, "bytes": 0, "invalid_utf8_bytes": 0}
            )
            row["rows"] += scan.rows
            row["documents"] += int((scan.sizes > 0).sum())
            row["bytes"] += int(scan.sizes.sum())
            row["invalid_utf8_bytes"] += scan.invalid_bytes
            first_row += scan.rows
    return list(files.values())


def warn_of_invalid_utf8(sources: Sequence[Mapping[str, Any]]) -> None:
    damaged = [row for row in sources if row["invalid_utf8_bytes"]]
    for row in damaged[:_FILES_NAMED]:
        warnings.warn(
            f"{row['file']}: {row['invalid_utf8_bytes']} bytes are not UTF-8 and were replaced by U+FFFD "
            "(tokenize.invalid_utf8: refuse makes this an error)",
            stacklevel=2,
        )
    if len(damaged) > _FILES_NAMED:
        warnings.warn(f"{len(damaged) - _FILES_NAMED} more files hold bytes that are not UTF-8", stacklevel=2)


def warn_of_large_validation(split: Split, total_bytes: int, validation_fraction: float) -> None:
    share = split.validation_bytes / total_bytes
    if share > max(0.5, validation_fraction + 0.1):
        warnings.warn(
            f"{share:.0%} of the text is held out for validation, {validation_fraction:.0%} was asked: documents are "
            "held out whole, and a very long one is among them; divide it (source.document_separator) or add documents",
            stacklevel=2,
        )


def warn_of_eos_in_text(occurrences: int, eos_token: str) -> None:
    if occurrences:
        warnings.warn(
            f"the text spells out the end-of-document token {eos_token} {occurrences} times; it was encoded as plain "
            "characters. If it separates documents of a txt file, set source.document_separator to it",
            stacklevel=2,
        )


def _tokens(count: int) -> str:
    for size, unit in ((2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if count >= size:
            return f"{count // size}{unit}"
    return str(count)
