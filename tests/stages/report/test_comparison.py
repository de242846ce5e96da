"""Claims and orders against made-up results that confirm or refute each of them; seeds against hand-made spreads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from lazypipe.stages.report import stage as report
from lazypipe.stages.report.comparison import Comparison, beside_published, published, ranks
from lazypipe.stages.report.config import ReportConfig
from lazypipe.stages.report.rows import VariantRow
from lazypipe.stages.report.seeds import certainty, seed_groups, seed_table
from tests.stages.report.test_stage import upstream
from tests.stages.tiny_experiment import context_in

UNIGRAM = 6.0
CLAIMS = {
    "worst": "Uniform mlp and gating are the worst",
    "near": "Hybrids are near standard where the published ones are",
    "better": "Every hybrid is better than its uniform model",
    "skip": "Without its non-standard blocks a hybrid collapses",
    "lazy": "Lazy Attention is near standard",
}


Row = dict[str, Any]  # as in report.json


def row(mixer: str, pattern: str, loss: float, **more: Any) -> Row:
    name = mixer if pattern == "uniform" else f"{mixer}_{pattern}"
    return {"variant": name, "mixer_name": mixer, "pattern": pattern, "validation_loss": loss, **more}


def typed(rows: list[Row]) -> list[VariantRow]:
    return [VariantRow.from_json(one) for one in rows]


def as_published() -> dict[str, dict[str, Any]]:
    """Losses that are the published perplexities themselves, and skips that collapse."""
    rows = [row(model.mixer, model.pattern, math.log(model.wikitext)) for model in published("deconstructing").models]
    for one in rows:
        if one["pattern"] != "uniform":
            one |= {"validation_loss/skip": 7.0, "validation_loss/skip_mixer": 5.0}
    rows.append(row("lazy", "uniform", math.log(38.5)))
    return {str(one["variant"]): one for one in rows}


def beside(rows: list[dict[str, Any]], unigram_entropy: float | None = UNIGRAM) -> Comparison:
    """Against the published figures, every row with the recipe of its name."""
    recipes = [{"model": {"mixer": one["mixer_name"], "pattern": one["pattern"]}} for one in rows]
    return beside_published("deconstructing", typed(rows), recipes, unigram_entropy)


def outcome(rows: dict[str, dict[str, Any]]) -> dict[str, bool | None]:
    found = beside(list(rows.values()))
    by_name = {claim.claim: claim.holds for claim in found.claims}
    assert set(by_name) == set(CLAIMS.values())
    return {short: by_name[name] for short, name in CLAIMS.items()}


def test_the_published_figures_confirm_their_own_claims() -> None:
    rows = as_published()
    assert outcome(rows) == dict.fromkeys(CLAIMS, True)
    found = beside(list(rows.values()))
    assert found.correlation["wikitext"] == pytest.approx(1.0)
    assert 0.5 < found.correlation["nlu"] < 1
    assert len(found.rows) == 13  # lazy has no counterpart
    first, last = found.rows[0], found.rows[-1]
    assert (first.mixer, first.ranks["validation_loss"], last.mixer) == ("standard", 1.0, "gating")
    assert first.perplexity == pytest.approx(38.1)


@pytest.mark.parametrize(
    ("claim", "variant", "key", "value", "number"),
    [
        ("worst", "random_qk", "validation_loss", 8.0, "random_qk 8.000"),
        ("near", "text_qk_even", "validation_loss", math.log(38.1 * 1.06), "text_qk even +6.0% (+1.0%)"),
        ("better", "taylor_even", "validation_loss", math.log(48.9), "taylor even -0.021"),
        ("skip", "gating_even", "validation_loss/skip", 5.9, "gating even 5.900"),
        ("lazy", "lazy", "validation_loss", math.log(38.1) + 0.06, "perplexity +6.2%"),
    ],
)
def test_one_number_refutes_a_claim_and_is_told(claim: str, variant: str, key: str, value: float, number: str) -> None:
    rows = as_published()
    rows[variant][key] = value
    assert outcome(rows)[claim] is False
    found = beside(list(rows.values()))
    (numbers,) = [one.numbers for one in found.claims if one.claim == CLAIMS[claim]]
    assert number in numbers


def test_a_hybrid_that_never_learned_cannot_collapse() -> None:
    rows = as_published()
    rows["mlp_even"] |= {"validation_loss": 6.5, "validation_loss/skip": 6.1}
    assert outcome(rows)["skip"] is True  # the others do
    assert outcome({"mlp_even": rows["mlp_even"]})["skip"] is None


def test_what_was_not_measured_is_neither_true_nor_false() -> None:
    rows = as_published()
    assert outcome({"standard": rows["standard"]}) == dict.fromkeys(CLAIMS)
    found = beside([rows["standard"], {**rows["mlp"], "validation_loss": None}], None)
    assert len(found.rows) == 1 and found.correlation == {"wikitext": None, "nlu": None}


def test_ranks_share_ties_and_a_reversed_order_is_minus_one() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    rows = as_published()
    for one in rows.values():
        one["validation_loss"] = -one["validation_loss"]
    found = beside(list(rows.values()))
    assert found.correlation["wikitext"] == pytest.approx(-1.0)


def test_of_several_recipes_the_first_answers_and_no_ablation_does() -> None:
    rows = [
        row("lazy", "uniform", 3.0, seed=0),
        row("lazy", "uniform", 4.0, seed=0),
        row("standard", "uniform", 4.1, seed=0),
        row("standard", "even", 4.3, seed=1),
        row("standard", "uniform", 9.0, seed=0),
    ]
    for number, one in enumerate(rows):
        one["variant"] = f"v{number}"
    recipes: list[dict[str, Any]] = [
        {"model": {"mixer": "lazy", "lazy_bias": False}},
        {"model": {"mixer": "lazy", "lazy_bias": True}},
        {"model": {"mixer": "standard"}, "seed": 0},
        {"model": {"mixer": "standard"}, "seed": 1},
        {"model": {"mixer": "standard"}, "lr": 0.1, "seed": 0},
    ]
    found = beside_published("deconstructing", typed(rows), recipes, UNIGRAM)
    assert found.left_out == ["v0", "v4"]
    (standard,) = found.rows
    assert standard.variants == ["v2", "v3"] and standard.validation_loss == pytest.approx(4.2)
    (lazy,) = [claim.numbers for claim in found.claims if claim.claim == CLAIMS["lazy"]]
    assert lazy.startswith("lazy 4.000, standard 4.200")


def seeded(losses: dict[str, tuple[float, ...]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows, recipes = [], []
    for name, values in losses.items():
        for seed, value in enumerate(values):
            rows.append({"variant": name if seed == 0 else f"{name}_{seed}", "validation_loss": value, "seed": seed})
            recipes.append({"model": {"mixer": name}, "seed": seed})
    return rows, recipes


def test_differences_are_measured_in_the_spread_of_the_seeds() -> None:
    near, base, far = (4.02, 4.00, 4.04), (4.01, 4.03, 3.99), (4.30, 4.32, 4.31)
    rows, recipes = seeded({"near": near, "base": base, "far": far, "once": (4.2,)})
    table = seed_table(seed_groups(typed(rows), recipes), "base")
    assert table is not None and table.reference == "base"
    groups = {group.name: group for group in table.groups}
    assert groups["far"].variants == ["far", "far_1", "far_2"] and groups["far"].seeds == [0, 1, 2]
    assert groups["near"].mean == pytest.approx(4.02) and groups["near"].deviation == pytest.approx(stdev(near))
    pooled = math.sqrt((stdev(far) ** 2 + stdev(base) ** 2) / 2)
    assert groups["far"].spread == pytest.approx(pooled)
    assert groups["far"].exceeds and not groups["near"].exceeds
    assert groups["once"].exceeds is None and groups["once"].deviation is None
    text = certainty(table)
    assert "far +0.300" in text and "do not exceed 2 times the spread of the seeds: near +0.010" in text
    assert "may be chance: once" in text


def test_without_repetitions_there_is_no_table() -> None:
    rows, recipes = seeded({"one": (4.0,), "other": (4.1,)})
    assert seed_table(seed_groups(typed(rows), recipes), "one") is None
    recipes[1] = {"model": {"mixer": "one"}, "seed": 0, "lr": 1.0}  # another learning rate is another model
    assert seed_groups(typed(rows), recipes) == []


def test_one_model_under_two_names_is_no_repetition() -> None:
    rows, recipes = seeded({"one": (4.0, 4.1), "other": (4.2,)})
    again = [{**rows[0], "variant": "again"}, *rows]
    twice = seed_groups(typed(again), [recipes[0], *recipes])
    assert [group.variants for group in twice] == [["again", "one_1"], ["other"]]
    assert seed_groups(typed(again[:2]), [recipes[0], recipes[0]]) == []
    table = seed_table(twice, "other")
    assert table is not None and "over them is 0.071 nats." in certainty(table)


def test_the_page_without_a_published_counterpart_says_so(tmp_path: Path) -> None:
    inputs = upstream(tmp_path, {"lazy": 4.0})
    context = context_in(tmp_path / "report")
    report.run(ReportConfig(compare_with="deconstructing"), inputs, context)
    page = (context.output_dir / "report.md").read_text(encoding="utf-8")
    assert "No variant has the mixer and pattern of one of its models." in page
    assert "| model | variants |" not in page and "* Lazy Attention is near standard: not measured." in page


def test_the_page_shows_the_published_order_the_ablations_and_the_seeds(tmp_path: Path) -> None:
    inputs = upstream(tmp_path, {"standard": 4.0, "gating": 4.5, "mlp": 5.0, "mlp_even": 4.1, "standard_b": 4.2})
    for name in ("gating", "mlp", "mlp_even"):
        pattern = "even" if name.endswith("even") else "uniform"
        inputs[f"sparsity/{name}"].manifest["facts"] |= {"mixer": name.removesuffix("_even"), "pattern": pattern}
        inputs[f"pretrain/{name}"].manifest["config"]["model"] |= {"mixer": name}
    inputs["pretrain/standard_b"].manifest["config"]["seed"] = 9
    # The identity of a config leaves out what is at its default: of nothing else, it is empty.
    inputs["pretrain/standard"].manifest["identity"] = {}
    inputs["pretrain/standard_b"].manifest["identity"] = {"seed": 9}
    inputs["evaluate/mlp_even"].manifest["metrics"]["validation_loss/skip"] = 7.25
    context = context_in(tmp_path / "report")
    report.run(ReportConfig(compare_with="deconstructing"), inputs, context)
    page = (context.output_dir / "report.md").read_text(encoding="utf-8")
    stored = json.loads((context.output_dir / "report.json").read_text(encoding="utf-8"))
    lines = page.splitlines()
    (line,) = [line for line in lines if line.startswith("| mlp, standard in even")]
    assert line == "| mlp, standard in even | mlp\\_even | 4.100 | 60.34 | 1.5 | 45.80 | 2 | 48.7 | 2 |"
    assert "* Uniform mlp and gating are the worst: **yes**. mlp 5.000, gating 4.500; the highest" in page
    assert "| mlp\\_even | 4.100 | 7.250 | – |" in page
    (seeds,) = [line for line in lines if line.startswith("| standard | 3, 9 |")]
    assert seeds == "| standard | 3, 9 | 4.100 | 0.1414 | – | – | – |"
    said = {finding["topic"]: finding["sentence"] for finding in stored["findings"]}
    assert "rank correlation of" in said["Published order"]
    assert said["Certainty"].startswith("1 model was trained with several seeds")
    assert stored["published"]["rows"][0]["variants"] == ["standard", "standard_b"]
