"""The part of a report that shows benchmarks: a line per task and metric, a column per variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lazypipe.stages.formats import perplexity
from lazypipe.stages.report.rows import Variant, has_table, read_table
from lazypipe.stages.report.table import MISSING

Row = Mapping[str, Any]


def benchmarks(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Lines {"task", "metric", "settings", "cells"} of every benchmark any variant ran; none when there are none.

    The best value of a line is bold, with its standard error where the harness has one. A last line averages `acc` over
    the tasks that all variants ran, if they are two or more.
    """
    tables = [by_metric(variant) for variant in variants]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    lines = []
    for task, metric in keys:
        rows = [table.get((task, metric)) for table in tables]
        some = next(row for row in rows if row is not None)
        best = best_of([None if row is None else row["value"] for row in rows], bool(some["higher_is_better"]))
        cells = [MISSING if row is None else cell(row, index in best) for index, row in enumerate(rows)]
        lines.append({"task": task, "metric": metric, "settings": settings(some), "cells": cells})
    shared = [key for key in keys if key[1] == "acc" and all(key in table for table in tables)]
    if len(shared) > 1:
        means = [sum(table[key]["value"] or 0.0 for key in shared) / len(shared) for table in tables]
        best = best_of(means, True)
        cells = [bold(f"{100 * mean:.1f} %", index in best) for index, mean in enumerate(means)]
        lines.append({"task": f"mean of {len(shared)} tasks", "metric": "acc", "settings": "", "cells": cells})
    return lines


def by_metric(variant: Variant) -> dict[tuple[str, str], Row]:
    """(task, metric) -> its row of tables/tasks; empty for an evaluation without benchmarks."""
    if not has_table(variant.evaluate, "tasks"):
        return {}
    return {(row["task"], row["metric"]): row for row in read_table(variant.evaluate, "tasks")}


def settings(row: Row) -> str:
    """'200 documents, 0-shot'"""
    return f"{row['documents']:,} documents, {row['num_fewshot']}-shot"


def cell(row: Row, is_best: bool) -> str:
    value, stderr = row["value"], row["stderr"]
    if value is None:
        return MISSING
    if row["metric"].startswith(("acc", "exact_match", "f1")):
        text = f"{100 * value:.1f} %" + ("" if stderr is None else f" ± {100 * stderr:.1f}")
    else:
        text = perplexity(value) + ("" if stderr is None else f" ± {perplexity(stderr)}")
    return bold(text, is_best)


def bold(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best else text


def best_of(values: Sequence[float | None], highest: bool) -> set[int]:
    """Numbers of the variants with the best value; none when there is nothing to compare or all are equal."""
    present = {index: value for index, value in enumerate(values) if value is not None}
    if len(present) < 2 or len(set(present.values())) == 1:
        return set()
    best = (max if highest else min)(present.values())
    return {index for index, value in present.items() if value == best}
