"""Our results beside published ones: which variant answers to which published model, both orders, and their agreement.

Published values live in stages/report/published/<name>.json with their source. A variant answers to a published model
of the same mixer and layer pattern; variants that differ in their seed only stand together as the mean of their losses.
Where several recipes have one mixer and pattern, as in a sweep, the first of the experiment answers. The others, and
ablations of Lazy Attention, which have no published counterpart, are named as left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.registry import MECHANISMS, STANDARD
from lazypipe.stages.metrics import VALIDATION_LOSS
from lazypipe.stages.report.claims import Claim, Key, OurModel, PublishedModel, claims
from lazypipe.stages.report.rows import VariantRow, pattern_name
from lazypipe.stages.report.seeds import without_seed

FOLDER = Path(__file__).parent / "published"


@dataclass(frozen=True)
class Published:
    """A file of published results. source: where they are from. notes: sentences for the page."""

    title: str
    source: str
    notes: list[str]
    models: list[PublishedModel]


@dataclass(frozen=True, kw_only=True)
class ComparedModel(PublishedModel, OurModel):
    """One model in both. ranks: by "validation_loss" of ours, "wikitext" and "nlu", from 1; ties share their mean."""

    ranks: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """report["published"]. rows: what both have, our best validation loss first. left_out: variants.

    correlation: Spearman's, of our loss with each published column (1: the same order); None with fewer than three.
    """

    title: str
    source: str
    notes: list[str]
    rows: list[ComparedModel]
    left_out: list[str]
    correlation: dict[str, float | None]
    claims: list[Claim]


def published(name: str) -> Published:
    stored: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Published(**{**stored, "models": [PublishedModel(**model) for model in stored["models"]]})


def beside_published(
    name: str, rows: Sequence[VariantRow], recipes: Sequence[Mapping[str, Any]], unigram_entropy: float | None
) -> Comparison:
    """Our rows beside the published results of this name. recipes: of pretrain, one for each row."""
    source = published(name)
    answering = first_recipes(rows, recipes)
    ours = by_mixer_and_pattern(answering)
    theirs = {(model.mixer, model.pattern): model for model in source.models}
    both = sorted((key for key in ours if key in theirs), key=lambda key: ours[key].validation_loss)
    columns = {
        "validation_loss": ranks([ours[key].validation_loss for key in both]),
        "wikitext": ranks([theirs[key].wikitext for key in both]),
        "nlu": ranks([-theirs[key].nlu for key in both]),
    }
    compared = [
        ComparedModel(
            **vars(theirs[key]), **vars(ours[key]), ranks={column: rank[index] for column, rank in columns.items()}
        )
        for index, key in enumerate(both)
    ]
    names = {row.variant for row in answering}
    return Comparison(
        title=source.title,
        source=source.source,
        notes=source.notes,
        rows=compared,
        left_out=[row.variant for row in rows if row.variant not in names],
        correlation={
            column: correlation(columns["validation_loss"], columns[column]) for column in ("wikitext", "nlu")
        },
        claims=claims(ours, theirs, unigram_entropy),
    )


def first_recipes(rows: Sequence[VariantRow], recipes: Sequence[Mapping[str, Any]]) -> list[VariantRow]:
    """The rows of the first recipe of every mixer and pattern, in all its seeds; no ablation of a mechanism."""
    first: dict[Key, str] = {}
    kept = []
    for row, recipe in zip(rows, recipes, strict=True):
        model = recipe.get("model", {})
        known = MECHANISMS.get(str(row.mixer_name))
        defaults = {name: ModelConfig.model_fields[name].default for name in (known.ablations if known else ())}
        if any(model.get(name, value) != value for name, value in defaults.items()):
            continue
        rest = without_seed(recipe)
        if first.setdefault(_key(row), rest) == rest:
            kept.append(row)
    return kept


def by_mixer_and_pattern(rows: Sequence[VariantRow]) -> dict[Key, OurModel]:
    """Our results by (mixer, pattern), means over the variants that share both; those without a loss are left out.

    A standard model is uniform whatever its pattern says.
    """
    groups: dict[Key, list[VariantRow]] = {}
    for row in rows:
        if row.value(VALIDATION_LOSS) is not None and row.mixer_name is not None:
            groups.setdefault(_key(row), []).append(row)
    models = {}
    for key, members in groups.items():
        loss = _mean(members, VALIDATION_LOSS.name)
        assert loss is not None
        models[key] = OurModel(
            variants=[row.variant for row in members],
            validation_loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            skip=_mean(members, f"{VALIDATION_LOSS.name}/skip"),
            skip_mixer=_mean(members, f"{VALIDATION_LOSS.name}/skip_mixer"),
        )
    return models


def _key(row: VariantRow) -> Key:
    mixer = str(row.mixer_name)
    return mixer, "uniform" if mixer == STANDARD else pattern_name(row.pattern)


def _mean(rows: Sequence[VariantRow], name: str) -> float | None:
    values = [value for row in rows if (value := row.metrics.get(name)) is not None]
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


def order_sentence(part: Comparison) -> str | None:
    """The finding on the order as a whole."""
    value, by_accuracy = part.correlation["wikitext"], part.correlation["nlu"]
    if value is None:
        return None
    held = [claim.holds for claim in part.claims if claim.holds is not None]
    return (
        f"The order of {len(part.rows)} models here and in {part.title} agrees with a rank correlation of "
        f"{value:.2f} by WikiText perplexity and {by_accuracy:.2f} by NLU accuracy; "
        f"{sum(held)} of {len(held)} published claims re-appear at this size."
    )
