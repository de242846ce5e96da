"""The comparison table: which numbers a report compares, what they are called, how they are written.

Imports nothing but the standard library, so that the command line can show a stored report at once. A row is a dict of
plain numbers (None where a number is missing), as in report.json; here it becomes text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
MISSING = "–"
PERPLEXITY_AT = "perplexity_at/"


def loss(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def perplexity(value: float) -> str:
    if value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.2g}"


def share(value: float) -> str:
    """0 ... 1 as per cent. Only an exact 0 is written as 0, and only an exact 1 as 100."""
    if value in (0.0, 1.0):
        return f"{100 * value:.0f} %"
    if abs(value) < 0.0005:
        return "<0.1 %"
    return ">99.9 %" if 0.9995 <= value < 1 else f"{100 * value:.1f} %"


def small(value: float) -> str:
    """A number around 0 ... 1 with three significant digits, or four decimals."""
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.4f}"


def threshold(value: float) -> str:
    """tau: around -1, or as a constant threshold around -1 / length."""
    return f"{value:.3f}" if abs(value) >= 0.05 else f"{value:.2g}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def difference(value: float) -> str:
    return f"{value:+,.0f}" if value else "0"


@dataclass(frozen=True)
class Column:
    """heading: in the page. short: in a terminal ('' = not shown there). best: which end of the scale is better."""

    key: str
    heading: str
    short: str
    write: Callable[[Any], str]
    best: Literal["lowest", "highest"] | None = None


COLUMNS = (
    Column("variant", "variant", "variant", str),
    Column("mixer", "mixer", "", str),
    Column("validation_loss", "validation loss (nats)", "val loss", loss, "lowest"),
    Column("perplexity", "perplexity", "ppl", perplexity, "lowest"),
    Column("bits_per_byte", "bits per byte", "bits/byte", small, "lowest"),
    Column(PERPLEXITY_AT, "perplexity at {} †", "ppl@{}", perplexity, "lowest"),
    Column("sparsity", "exact sparsity", "sparsity", share, "highest"),
    Column("untrained_sparsity", "sparsity untrained", "untrained", share),
    Column("near_zero", "near zero", "", share),
    Column("surviving_mass", "surviving mass", "", small),
    Column("sink", "sink", "sink", small),
    Column("tokens_per_s", "training tokens/s", "tokens/s", count, "highest"),
    Column("mfu", "MFU", "MFU", share, "highest"),
    Column("peak_memory_gb", "training memory (GB)", "", small, "lowest"),
    Column("parameters", "parameters", "params", count),
    Column("parameters_difference", "against {}", "", difference),
)


def columns_of(report: Mapping[str, Any]) -> list[Column]:
    """The columns of a report in its own order, headings filled in: `perplexity_at/512` names its context length."""
    known = {column.key: column for column in COLUMNS}
    found = []
    for key in report["columns"]:
        kind, detail = key, str(report.get("reference", ""))
        if key.startswith(PERPLEXITY_AT):
            kind, detail = PERPLEXITY_AT, key.removeprefix(PERPLEXITY_AT)
        column = known[kind]
        found.append(Column(key, column.heading.format(detail), column.short.format(detail), column.write, column.best))
    return found


def cell(column: Column, row: Row) -> str:
    value = row.get(column.key)
    return MISSING if value is None else column.write(value)


def best_rows(column: Column, rows: Sequence[Row]) -> set[int]:
    """Numbers of the rows that write the best value of a column; none when all are equal or nothing is better."""
    values = {index: row[column.key] for index, row in enumerate(rows) if row.get(column.key) is not None}
    if column.best is None or len(values) < 2:
        return set()
    written = {index: column.write(value) for index, value in values.items()}
    if len(set(written.values())) == 1:
        return set()
    best = (min if column.best == "lowest" else max)(values, key=lambda index: values[index])
    return {index for index, text in written.items() if text == written[best]}


def unigram_row(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The yardstick as a row: a model that knows token frequencies and nothing else."""
    from math import exp

    entropy = report.get("unigram_entropy")
    if entropy is None:
        return None
    return {"variant": "(unigram)", "validation_loss": entropy, "perplexity": exp(entropy)}


def terminal_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of strings) of report.json for a terminal; a last row `(unigram)` holds the yardstick."""
    columns = [column for column in columns_of(report) if column.short]
    rows: list[Row] = list(report["rows"])
    yardstick = unigram_row(report)
    if yardstick is not None:
        rows.append(yardstick)
    return [column.short for column in columns], [[cell(column, row) for column in columns] for row in rows]
