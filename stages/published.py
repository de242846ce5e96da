"""Our results beside published ones: which variant answers to which published model, both orders, and their agreement.

Published figures live in stages/published/<name>.json with their source. A variant answers to a published model of the
same mixer and layer pattern; variants that differ in their seed only stand together as the mean of their losses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.published_claims import claims
from stages.report_table import Row

FOLDER = Path(__file__).parent / "published"


def published(name: str) -> dict[str, Any]:
    """{"title", "source", "notes", "models": [{"mixer", "pattern", "nlu", "wikitext", "lambada"}]}"""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def beside_published(name: str, rows: Sequence[Row], unigram_entropy: float | None) -> dict[str, Any]:
    """report["published"]: {"title", "source", "notes", "rows", "correlation", "claims"}.

    rows: one per (mixer, pattern) that both have, best validation loss of ours first: our mean "validation_loss" and
    "perplexity", "wikitext" and "nlu" of the source, and the rank in each from 1, ties sharing their mean.
    correlation: Spearman's, of our loss with each published figure (1: the same order); None with fewer than three.
    """
    source = published(name)
    ours = by_mixer_and_pattern(rows)
    theirs = {(model["mixer"], model["pattern"]): model for model in source["models"]}
    both = sorted((key for key in ours if key in theirs), key=lambda key: ours[key]["validation_loss"])
    table = [{**theirs[key], **ours[key]} for key in both]
    columns = {
        "validation_loss": ranks([row["validation_loss"] for row in table]),
        "wikitext": ranks([row["wikitext"] for row in table]),
        "nlu": ranks([-row["nlu"] for row in table]),
    }
    for number, row in enumerate(table):
        row["ranks"] = {column: rank[number] for column, rank in columns.items()}
    return {
        "title": source["title"],
        "source": source["source"],
        "notes": source["notes"],
        "rows": table,
        "correlation": {
            column: correlation(columns["validation_loss"], columns[column]) for column in ("wikitext", "nlu")
        },
        "claims": [claim._asdict() for claim in claims(ours, theirs, unigram_entropy)],
    }


def by_mixer_and_pattern(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Any]]:
    """Our numbers by (mixer, pattern), means over the variants that share both; those without a loss are left out.

    A standard model is uniform whatever its pattern says. The ablations' losses are named as in the rows.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("validation_loss") is None or row.get("mixer_name") is None:
            continue
        pattern = "uniform" if row["mixer_name"] == "standard" else _named(row.get("pattern"))
        groups.setdefault((str(row["mixer_name"]), pattern), []).append(row)
    found = {}
    for key, members in groups.items():
        loss = _mean(members, "validation_loss")
        assert loss is not None
        found[key] = {
            "variants": [str(row["variant"]) for row in members],
            "validation_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "skip": _mean(members, "validation_loss/skip"),
            "skip_mixer": _mean(members, "validation_loss/skip_mixer"),
        }
    return found


def _named(pattern: object) -> str:
    return pattern if isinstance(pattern, str) else " ".join(map(str, pattern or ()))  # type: ignore[call-overload]


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 1 for the lowest; equal values share the mean of their ranks."""
    order = sorted(values)
    return [(2 * order.index(value) + order.count(value) + 1) / 2 for value in values]


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's correlation of two lists of ranks, so Spearman's of what was ranked; None when it says nothing."""
    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    from statistics import correlation as pearson

    return pearson(one, other)


def order_sentence(part: Mapping[str, Any]) -> str | None:
    """The finding on the order as a whole."""
    value = part["correlation"]["wikitext"]
    if value is None:
        return None
    held = [claim for claim in part["claims"] if claim["holds"] is not None]
    return (
        f"The order of {len(part['rows'])} models here and in {part['title']} agrees with a rank correlation of "
        f"{value:.2f} by WikiText perplexity and {part['correlation']['nlu']:.2f} by NLU accuracy; "
        f"{sum(claim['holds'] for claim in held)} of {len(held)} published claims re-appear at this size."
    )
