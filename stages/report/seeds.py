"""Variants that differ in the seed of training only: their mean and spread, and which differences exceed it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from lazypipe.stages.report.table import Row, loss

BEYOND = 2.0  # spreads of the seeds that a difference must exceed to be told from them


def seed_groups(rows: Sequence[Row], recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups of rows whose recipes (of pretrain) agree in all but the seed, in the order of the experiment.

    [{"name" (of its first variant), "variants", "seeds", "mean", "deviation"}] of the validation loss in nats;
    deviation is the sample's (n - 1), None for a single one. Left out are rows without a loss, and all but the first of
    those with one recipe and one seed: the same model under several names. [] when every group has one member.
    """
    groups: dict[str, dict[object, Row]] = {}
    for row, recipe in zip(rows, recipes, strict=True):
        if row.get("validation_loss") is not None:
            groups.setdefault(without_seed(recipe), {}).setdefault(row.get("seed"), row)
    if all(len(members) == 1 for members in groups.values()):
        return []
    found = []
    for group in groups.values():
        members = list(group.values())
        losses = [float(row["validation_loss"]) for row in members]
        found.append(
            {
                "name": str(members[0]["variant"]),
                "variants": [str(row["variant"]) for row in members],
                "seeds": [row.get("seed") for row in members],
                "mean": fmean(losses),
                "deviation": stdev(losses) if len(losses) > 1 else None,
            }
        )
    return found


def without_seed(recipe: Mapping[str, Any]) -> str:
    """Equal for recipes that differ in the seed only."""
    return json.dumps({name: value for name, value in recipe.items() if name != "seed"}, sort_keys=True, default=str)


def against(group: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """{"difference" of the means, "spread" of the seeds (pooled deviation), "exceeds" (beyond BEYOND spreads)}.

    spread and exceeds are None unless both groups have several seeds.
    """
    difference = group["mean"] - reference["mean"]
    if group["deviation"] is None or reference["deviation"] is None:
        return {"difference": difference, "spread": None, "exceeds": None}
    weights = [len(one["variants"]) - 1 for one in (group, reference)]
    squares = [one["deviation"] ** 2 for one in (group, reference)]
    spread = math.sqrt(sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights))
    return {"difference": difference, "spread": spread, "exceeds": abs(difference) > BEYOND * spread}


def seed_table(groups: Sequence[Mapping[str, Any]], reference: str) -> dict[str, Any] | None:
    """report["seeds"]: {"reference", "groups" (with `against` the one that holds the reference)}; None without."""
    if not groups:
        return None
    base = next((group for group in groups if reference in group["variants"]), groups[0])
    nothing = {"difference": None, "spread": None, "exceeds": None}
    rows = [{**group, **(nothing if group is base else against(group, base))} for group in groups]
    return {"reference": base["name"], "groups": rows}


def certainty(table: Mapping[str, Any]) -> str:
    """What the seeds say, for the findings."""
    repeated = [group for group in table["groups"] if group["deviation"] is not None]
    single = [group for group in table["groups"] if group["deviation"] is None]
    spreads = [group["deviation"] for group in repeated]
    models = "1 model was" if len(repeated) == 1 else f"{len(repeated)} models were"
    low, high = loss(min(spreads)), loss(max(spreads))
    text = (
        f"{models} trained with several seeds; the standard deviation of the validation loss over them is "
        f"{low if low == high else f'{low} to {high}'} nats."
    )
    for exceeds, what in ((True, "exceed"), (False, "do not exceed")):
        found = [group for group in repeated if group["exceeds"] is exceeds]
        if found:
            shown = ", ".join(f"{group['name']} {group['difference']:+.3f}" for group in found)
            text += (
                f" Differences to {table['reference']} that {what} {BEYOND:g} times the spread of the seeds: {shown}."
            )
    if single:
        text += f" Trained once, small differences may be chance: {', '.join(group['name'] for group in single)}."
    return text
