"""Our results beside published ones: which variant answers to which published model, both orders, and their agreement.

Published figures live in stages/published/<name>.json with their source. A variant answers to a published model of the
same mixer and layer pattern; variants that differ in their seed only stand together as the mean of their losses. Where
several recipes have one mixer and pattern, as in a sweep, the first of the experiment answers. The others, and
ablations of Lazy Attention, which have no published counterpart, are named as left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lazypipe.model.config import LAZY_SWITCHES, ModelConfig
from lazypipe.stages.report.claims import claims
from lazypipe.stages.report.seeds import without_seed
from lazypipe.stages.report.table import Row

FOLDER = Path(__file__).parent / "published"


def published(name: str) -> dict[str, Any]:
    """{"title", "source", "notes", "models": [{"mixer", "pattern", "nlu", "wikitext", "lambada"}]}"""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def beside_published(
    name: str, rows: Sequence[Row], recipes: Sequence[Mapping[str, Any]], unigram_entropy: float | None
) -> dict[str, Any]:
    """report["published"]: {"title", "source", "notes", "rows", "left_out", "correlation", "claims"}.

    recipes: of pretrain, one for each row.
    rows: one per (mixer, pattern) that both have, best validation loss of ours first: our mean "validation_loss" and
    "perplexity", "wikitext" and "nlu" of the source, and the rank in each from 1, ties sharing their mean.
    correlation: Spearman's, of our loss with each published figure (1: the same order); None with fewer than three.
    """
    source = published(name)
    answering = first_recipes(rows, recipes)
    ours = by_mixer_and_pattern(answering)
    names = {row["variant"] for row in answering}
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
        "left_out": [str(row["variant"]) for row in rows if row["variant"] not in names],
        "correlation": {
            column: correlation(columns["validation_loss"], columns[column]) for column in ("wikitext", "nlu")
        },
        "claims": [claim._asdict() for claim in claims(ours, theirs, unigram_entropy)],
    }


def first_recipes(rows: Sequence[Row], recipes: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows of the first recipe of every mixer and pattern, in all its seeds; no ablation of Lazy Attention."""
    defaults = {switch: ModelConfig.model_fields[switch].default for switch in LAZY_SWITCHES}
    first: dict[tuple[str, str], str] = {}
    kept = []
    for row, recipe in zip(rows, recipes, strict=True):
        model = recipe.get("model", {})
        if row.get("mixer_name") == "lazy" and any(model.get(name, value) != value for name, value in defaults.items()):
            continue
        rest = without_seed(recipe)
        if first.setdefault(_key(row), rest) == rest:
            kept.append(row)
    return kept


def by_mixer_and_pattern(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Any]]:
    """Our numbers by (mixer, pattern), means over the variants that share both; those without a loss are left out.

    A standard model is uniform whatever its pattern says. The ablations' losses are named as in the rows.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("validation_loss") is None or row.get("mixer_name") is None:
            continue
        groups.setdefault(_key(row), []).append(row)
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


def _key(row: Row) -> tuple[str, str]:
    """(mixer, pattern)"""
    mixer = str(row.get("mixer_name"))
    return mixer, "uniform" if mixer == "standard" else _named(row.get("pattern"))


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
