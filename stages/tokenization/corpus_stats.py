"""What tokenization reports: entropy, document lengths, what each file held, and what a user should look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lazypipe.stages.contract import Warn
from lazypipe.stages.tokenization.documents import Part
from lazypipe.stages.tokenization.filters import dropped_counts
from lazypipe.stages.tokenization.scan import PartScan
from lazypipe.stages.tokenization.split import Split

_FILES_NAMED = 5
_BINS = 24


def unigram_entropy(counts: npt.NDArray[np.int64]) -> float:
    """H = -sum p ln p in nats, p = counts / sum: the loss of a model that knows token frequencies and nothing else."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def length_histogram(lengths: Mapping[str, Sequence[npt.NDArray[np.int64]]]) -> list[dict[str, int]]:
    """Rows {from_tokens, to_tokens, train_documents, validation_documents}: bins over all lengths, both ends included.

    lengths: per split, document lengths in tokens in any number of chunks. Bins are equally wide on a logarithmic
    scale, or on a linear one when no document is 4 times as long as another.
    """
    chunks = [chunk for split in lengths.values() for chunk in split if len(chunk)]
    shortest, longest = min(int(c.min()) for c in chunks), max(int(c.max()) for c in chunks)
    spaced = np.geomspace if longest >= 4 * shortest else np.linspace
    edges = np.unique(np.rint(spaced(shortest, longest + 1, _BINS + 1)).astype(np.int64))
    counts = {
        name: np.sum([np.histogram(chunk, edges)[0] for chunk in split], axis=0) for name, split in lengths.items()
    }
    return [
        {"from_tokens": int(edges[i]), "to_tokens": int(edges[i + 1]) - 1}
        | {f"{name}_documents": int(split_counts[i]) for name, split_counts in counts.items()}
        for i in range(len(edges) - 1)
    ]


def length_figure(histogram: Sequence[Mapping[str, int]]) -> Any:
    """A matplotlib figure of length_histogram's rows, the two splits stacked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    left = np.array([row["from_tokens"] for row in histogram])
    right = np.array([row["to_tokens"] + 1 for row in histogram])
    bottom = np.zeros(len(histogram))
    for name, color in (("train", "#4477aa"), ("validation", "#ee7733")):
        heights = np.array([row[f"{name}_documents"] for row in histogram])
        label = f"{name} ({heights.sum():,})"
        axes.bar(left, heights, right - left, bottom, align="edge", color=color, edgecolor="white", label=label)
        bottom += heights
    if right[-1] >= 10 * left[0]:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("document length in tokens")
    axes.set_ylabel("documents")
    axes.set_title("Document lengths")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def source_rows(
    units: Sequence[tuple[Part, ...]], scans: Sequence[Sequence[PartScan]], reasons: npt.NDArray[np.uint8]
) -> list[dict[str, Any]]:
    """One row per file: {file, first_row, rows, documents, bytes, invalid_utf8_bytes} and what the filters left out of
    it (`filters.dropped_counts`); rows without text have no document. first_row locates `source_row` of the docs
    table. reasons: uint8 [rows] of filters.py.
    """
    files: dict[str, dict[str, Any]] = {}
    first_row = 0
    for unit, unit_scans in zip(units, scans, strict=True):
        for part, scan in zip(unit, unit_scans, strict=True):
            counts = {
                "rows": scan.rows,
                "documents": int((scan.sizes > 0).sum()),
                "bytes": int(scan.sizes.sum()),
                "invalid_utf8_bytes": scan.invalid_bytes,
                **dropped_counts(reasons[first_row : first_row + scan.rows], scan.sizes),
            }
            row = files.setdefault(str(part.file.path), {"file": str(part.file.path), "first_row": first_row})
            for name, count in counts.items():
                row[name] = row.get(name, 0) + count
            first_row += scan.rows
    return list(files.values())


def warn_of_invalid_utf8(sources: Sequence[Mapping[str, Any]], warn: Warn) -> None:
    damaged = [row for row in sources if row["invalid_utf8_bytes"]]
    for row in damaged[:_FILES_NAMED]:
        warn(
            f"{row['file']}: {row['invalid_utf8_bytes']} bytes are not UTF-8 and were replaced by U+FFFD "
            "(tokenize.invalid_utf8: refuse makes this an error)"
        )
    if len(damaged) > _FILES_NAMED:
        warn(f"{len(damaged) - _FILES_NAMED} more files hold bytes that are not UTF-8")


def warn_of_large_validation(split: Split, total_bytes: int, validation_fraction: float, warn: Warn) -> None:
    share = split.validation_bytes / total_bytes
    if share > max(0.5, validation_fraction + 0.1):
        warn(
            f"{share:.0%} of the text is held out for validation, {validation_fraction:.0%} was asked: documents are "
            "held out whole, and a very long one is among them; divide it (source.document_separator) or add documents"
        )


def warn_of_eos_in_text(occurrences: int, eos_token: str, warn: Warn) -> None:
    if occurrences:
        warn(
            f"the text spells out the end-of-document token {eos_token} {occurrences} times; it was encoded as plain "
            "characters. If it separates documents of a txt file, set source.document_separator to it"
        )
