"""The comparison table of a report: which values it shows, under which headings, how they are written.

Imports neither NumPy nor pyarrow, so that the command line can show a stored report at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any, Literal

from lazypipe.stages.formats import count, small
from lazypipe.stages.metrics import PERPLEXITY, PERPLEXITY_AT, VALIDATION_LOSS, reported
from lazypipe.stages.report.rows import VariantRow

MISSING = "–"


def difference(value: float) -> str:
    return f"{value:+,.0f}" if value else "0"


@dataclass(frozen=True)
class Column:
    """heading: in the page. short: in a terminal ("": not shown there). best: which end of the scale is better."""

    key: str
    heading: str
    short: str
    write: Callable[[Any], str]
    best: Literal["lowest", "highest"] | None = None


def known_columns() -> list[Column]:
    """Every column a report can have, in its order: the variant, the declared metrics, its size."""
    return [
        Column("variant", "variant", "variant", str),
        Column("mixer", "mixer", "", str),
        *(Column(one.name, one.heading, one.short, one.write, one.better) for one in reported()),
        Column("parameters", "parameters", "params", count),
        Column("parameters_difference", "against {}", "", difference),
    ]


def column_keys(rows: Sequence[VariantRow], extrapolated: int | None) -> list[str]:
    """Keys of the columns for these rows. extrapolated: the context length whose perplexity has one."""
    optional = {one.name for one in reported() if one.optional and all(row.value(one) is None for row in rows)}
    keys = [column.key for column in known_columns() if column.key not in optional]
    at = keys.index(PERPLEXITY_AT.name)
    keys[at : at + 1] = [] if extrapolated is None else [f"{PERPLEXITY_AT.name}{extrapolated}"]
    if len(rows) == 1:
        keys.remove("parameters_difference")
    return keys


def columns_of(keys: Sequence[str], reference: str) -> list[Column]:
    """The columns of these keys with their headings filled in: `perplexity_at/512` names its context length.

    A stored report may have a metric that is declared no more: it is written plainly under its own name.
    """
    known = {column.key: column for column in known_columns()}
    columns = []
    for key in keys:
        kind, detail = key, reference
        if key.startswith(PERPLEXITY_AT.name):
            kind, detail = PERPLEXITY_AT.name, key.removeprefix(PERPLEXITY_AT.name)
        column = known.get(kind, Column(key, key.replace("_", " "), "", small))
        columns.append(
            Column(key, column.heading.format(detail), column.short.format(detail), column.write, column.best)
        )
    return columns


def cell(column: Column, row: VariantRow) -> str:
    value = row.to_json().get(column.key)
    return MISSING if value is None else column.write(value)


def best_rows(column: Column, rows: Sequence[VariantRow]) -> set[int]:
    """Indices of the rows that write the best value of a column; none when all are equal or nothing is better."""
    cells = [row.to_json().get(column.key) for row in rows]
    values = {index: value for index, value in enumerate(cells) if value is not None}
    if column.best is None or len(values) < 2:
        return set()
    written = {index: column.write(value) for index, value in values.items()}
    if len(set(written.values())) == 1:
        return set()
    best = (min if column.best == "lowest" else max)(values, key=lambda index: values[index])
    return {index for index, text in written.items() if text == written[best]}


def unigram_row(entropy: float) -> VariantRow:
    """The yardstick as a row: a model that knows token frequencies and nothing else."""
    return VariantRow(variant="(unigram)", metrics={VALIDATION_LOSS.name: entropy, PERPLEXITY.name: exp(entropy)})


def terminal_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of strings) of a report.json for a terminal; a last row `(unigram)` holds the yardstick."""
    columns = [column for column in columns_of(report["columns"], str(report.get("reference", ""))) if column.short]
    rows = [VariantRow.from_json(row) for row in report["rows"]]
    if report.get("unigram_entropy") is not None:
        rows.append(unigram_row(report["unigram_entropy"]))
    return [column.short for column in columns], [[cell(column, row) for column in columns] for row in rows]
