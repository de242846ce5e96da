"""The parts of a report about longer contexts and retrieval, for variants whose evaluation measured them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lazypipe.stages.contract import Context
from lazypipe.stages.figures import by_length
from lazypipe.stages.figures.listed import EXTRAPOLATION, PROBES
from lazypipe.stages.formats import perplexity, share
from lazypipe.stages.report.rows import Variant, has_table, read_table
from lazypipe.stages.report.table import MISSING

Row = Mapping[str, Any]


def sections(variants: Sequence[Variant], context: Context) -> dict[str, Any]:
    """{"extrapolation", "probes"}: lines of the page's tables, each empty when no variant has its numbers.

    Draws figures/extrapolation and figures/probes of all variants that have.
    """
    lengths = {v.evaluation.seq_len for v in variants}
    trained = lengths.pop() if len(lengths) == 1 else None
    lengths_of = {
        v.name: read_table(v.evaluate, "extrapolation") for v in variants if has_table(v.evaluate, "extrapolation")
    }
    probed = {v.name: read_table(v.evaluate, "probes") for v in variants if has_table(v.evaluate, "probes")}
    if lengths_of:
        tables = {
            v.name: (lengths_of[v.name], read_table(v.evaluate, "positions")) for v in variants if v.name in lengths_of
        }
        context.log_figure(EXTRAPOLATION.name, by_length.extrapolation(tables, trained))
    if probed:
        context.log_figure(PROBES.name, by_length.probes(probed, trained))
    names = [variant.name for variant in variants]
    return {"extrapolation": extrapolation_lines(names, lengths_of), "probes": probe_lines(names, probed)}


def tables_of(variants: Sequence[Variant], name: str) -> dict[str, list[dict[str, Any]]]:
    """A table of the evaluations that have it, by variant."""
    return {one.name: read_table(one.evaluate, name) for one in variants if has_table(one.evaluate, name)}


def extrapolation_lines(names: Sequence[str], tables: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """A line per context length and stride, a perplexity per variant; † beyond the trained length."""
    cells = {
        (name, row["context_length"], row["stride"]): perplexity(row["perplexity"])
        + (" †" if row["extrapolation"] else "")
        for name, rows in tables.items()
        for row in rows
    }
    lines = sorted({(length, -stride) for _, length, stride in cells})
    return [
        {
            "length": length,
            "windows": "side by side" if -stride == length else f"sliding by {-stride}",
            "cells": [cells.get((name, length, -stride), MISSING) for name in names],
        }
        for length, stride in lines
    ]


def probe_lines(names: Sequence[str], tables: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """A line per probe and length: per variant 'accuracy (control), gain ± error'. Depths are averaged."""
    groups: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for name, rows in tables.items():
        for row in rows:
            groups.setdefault((row["probe"], row["length"]), {}).setdefault(name, []).append(row)
    order = {probe: number for number, (probe, _) in enumerate(groups)}
    return [
        {"probe": probe, "length": length, "cells": [probe_cell(group.get(name)) for name in names]}
        for (probe, length), group in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1]))
    ]


def probe_cell(rows: Sequence[Row] | None) -> str:
    if not rows:
        return MISSING
    accuracy, control, gain = (
        sum(row[name] for row in rows) / len(rows) for name in ("accuracy", "control_accuracy", "gain")
    )
    errors = [row["gain_error"] for row in rows if row["gain_error"] is not None]
    error = f" ± {sum(errors) / len(errors):.3f}" if errors else ""  # the depths share their texts
    beyond = " †" if rows[0]["extrapolation"] else ""
    gain = round(gain, 3) + 0.0  # never -0.000
    return f"{share(accuracy)} ({share(control)}), {gain:+.3f}{error}{beyond}"
