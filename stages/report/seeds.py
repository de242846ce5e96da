"""Variants that differ in the seed of training only: their mean and spread, and which differences exceed it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from lazypipe.stages.formats import loss
from lazypipe.stages.metrics import VALIDATION_LOSS
from lazypipe.stages.report.rows import VariantRow

BEYOND = 2.0  # spreads of the seeds that a difference must exceed to be told from them


@dataclass(frozen=True, kw_only=True)
class SeedGroup:
    """Variants of one recipe in several seeds, named after the first: mean and standard deviation of their losses.

    deviation: the sample's (n - 1), None for a single one. difference: of the mean to the reference's. spread: pooled
    deviation of the two. exceeds: whether the difference is beyond BEYOND spreads. None for the reference itself, the
    latter two also unless both groups have several seeds. Losses in nats.
    """

    name: str
    variants: list[str]
    seeds: list[int | None]
    mean: float
    deviation: float | None
    difference: float | None = None
    spread: float | None = None
    exceeds: bool | None = None


@dataclass(frozen=True)
class SeedTable:
    """reference: name of the group that the others are compared with."""

    reference: str
    groups: list[SeedGroup]


def seed_groups(rows: Sequence[VariantRow], recipes: Sequence[Mapping[str, Any]]) -> list[SeedGroup]:
    """Groups of rows whose recipes (of pretrain) agree in all but the seed, in the order of the experiment.

    Left out are rows without a loss, and all but the first of those with one recipe and one seed: the same model under
    several names. [] when every group has one member.
    """
    groups: dict[str, dict[int | None, tuple[VariantRow, float]]] = {}
    for row, recipe in zip(rows, recipes, strict=True):
        value = row.value(VALIDATION_LOSS)
        if value is not None:
            groups.setdefault(without_seed(recipe), {}).setdefault(row.seed, (row, value))
    if all(len(members) == 1 for members in groups.values()):
        return []
    return [seed_group(list(group.values())) for group in groups.values()]


def seed_group(members: Sequence[tuple[VariantRow, float]]) -> SeedGroup:
    """One group of (row, loss)."""
    losses = [value for _, value in members]
    return SeedGroup(
        name=members[0][0].variant,
        variants=[row.variant for row, _ in members],
        seeds=[row.seed for row, _ in members],
        mean=fmean(losses),
        deviation=stdev(losses) if len(losses) > 1 else None,
    )


def without_seed(recipe: Mapping[str, Any]) -> str:
    """Equal for recipes that differ in the seed only."""
    return json.dumps({name: value for name, value in recipe.items() if name != "seed"}, sort_keys=True, default=str)


def against(group: SeedGroup, reference: SeedGroup) -> SeedGroup:
    """The group with its difference to the reference, in spreads where both have several seeds."""
    difference = group.mean - reference.mean
    if group.deviation is None or reference.deviation is None:
        return replace(group, difference=difference)
    weights = [len(one.variants) - 1 for one in (group, reference)]
    squares = [group.deviation**2, reference.deviation**2]
    spread = math.sqrt(sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights))
    return replace(group, difference=difference, spread=spread, exceeds=abs(difference) > BEYOND * spread)


def seed_table(groups: Sequence[SeedGroup], reference: str) -> SeedTable | None:
    """The groups against the one that holds the variant `reference`; None without groups."""
    if not groups:
        return None
    base = next((group for group in groups if reference in group.variants), groups[0])
    return SeedTable(base.name, [group if group is base else against(group, base) for group in groups])


def certainty(table: SeedTable) -> str:
    """What the seeds say, for the findings."""
    spreads = [group.deviation for group in table.groups if group.deviation is not None]
    single = [group.name for group in table.groups if group.deviation is None]
    models = "1 model was" if len(spreads) == 1 else f"{len(spreads)} models were"
    low, high = loss(min(spreads)), loss(max(spreads))
    text = (
        f"{models} trained with several seeds; the standard deviation of the validation loss over them is "
        f"{low if low == high else f'{low} to {high}'} nats."
    )
    for exceeds, what in ((True, "exceed"), (False, "do not exceed")):
        shown = [f"{group.name} {group.difference:+.3f}" for group in table.groups if group.exceeds is exceeds]
        if shown:
            text += (
                f" Differences to {table.reference} that {what} {BEYOND:g} times the spread of the seeds: "
                f"{', '.join(shown)}."
            )
    if single:
        text += f" Trained once, small differences may be chance: {', '.join(single)}."
    return text
