"""What runs, what is cached and why, on a store filled by hand: planning executes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import Field

from lazypipe.pipeline.execution.backends import Capacity, demand_of
from lazypipe.pipeline.experiment.schema import compose
from lazypipe.pipeline.planning.plan import Decision, Node, Selection, build_nodes, decide, explain
from lazypipe.pipeline.store.store import MANIFEST, Store
from lazypipe.stages.config import StageConfig
from lazypipe.stages.contract import UserError
from lazypipe.stages.registry import STAGES, in_order, stage_row
from lazypipe.stages.stage_row import StageRow
from tests.pipeline.store.filled_store import ALL, SMALL, SOURCE, commit, filled, nodes_of, running


def actions(plan: Mapping[str, Decision]) -> dict[str, str]:
    return {node_id: decision.action for node_id, decision in plan.items()}


# ---- nodes


def test_the_graph_has_one_branch_per_variant_in_topological_order() -> None:
    nodes = nodes_of()
    assert list(nodes) == ALL
    assert dict(nodes["evaluate/lazy"].inputs) == {"tokenize": "tokenize", "pretrain": "pretrain/lazy"}
    assert list(nodes["report"].inputs) == ALL[:-1]
    assert len({node.fingerprint for node in nodes.values()}) == len(ALL)


def test_a_change_moves_the_fingerprints_below_it_and_no_others() -> None:
    before = nodes_of()

    def moved(nodes: Mapping[str, Node]) -> list[str]:
        return [i for i in ALL if nodes[i].fingerprint != before[i].fingerprint]

    assert moved(nodes_of()) == moved(nodes_of(name="renamed", storage={"root": "x"})) == []
    assert moved(nodes_of(resources={"pretrain": {"workers": 2}}, evaluate={"batch_tokens": 1})) == []
    assert moved(nodes_of(source={"tokenize": {"source": {"files": []}, "tokenizer": {}}})) == ALL
    assert moved(nodes_of(sparsity={"windows": 3})) == ["sparsity/lazy", "sparsity/standard", "report"]
    lazy_only = {"lazy": {"mixer": "lazy", "lr": 1e-3}, "standard": {}}
    assert moved(nodes_of(variants=lazy_only)) == ["pretrain/lazy", "evaluate/lazy", "sparsity/lazy", "report"]
    assert moved(nodes_of(seed=1)) == [i for i in ALL if i != "tokenize"]


def test_a_variants_name_and_place_are_not_part_of_its_recipe() -> None:
    before = nodes_of()
    after = nodes_of(variants={"plain": {}, "lazy": {"mixer": "lazy"}})
    assert after["pretrain/plain"].fingerprint == before["pretrain/standard"].fingerprint
    assert after["sparsity/lazy"].fingerprint == before["sparsity/lazy"].fingerprint
    assert after["report"].fingerprint != before["report"].fingerprint
    turned = nodes_of(variants={"standard": {}, "lazy": {"mixer": "lazy"}})
    assert turned["report"].fingerprint == before["report"].fingerprint


# ---- decisions


def test_everything_runs_on_an_empty_store_and_nothing_on_a_full_one(tmp_path: Path) -> None:
    nodes = nodes_of()
    empty = decide(nodes, Store(tmp_path), Selection())
    assert running(empty) == ALL
    assert all("nothing stored for this recipe" in decision.reasons for decision in empty.values())
    full = decide(nodes, filled(tmp_path, nodes), Selection(), full_check=True)
    assert running(full) == []
    assert all(d.generation is not None and not d.notes and not d.reasons for d in full.values())


def test_planning_writes_nothing(tmp_path: Path) -> None:
    nodes = nodes_of()
    decide(nodes, Store(tmp_path / "absent"), Selection(force=("tokenize",)))
    explain(nodes["tokenize"], Store(tmp_path / "absent"))
    assert not (tmp_path / "absent").exists()


def test_a_missing_stage_runs_with_everything_below_it(tmp_path: Path) -> None:
    nodes = nodes_of()
    store = filled(tmp_path, nodes, ["tokenize", "pretrain/standard", "evaluate/standard", "sparsity/standard"])
    plan = decide(nodes, store, Selection())
    assert running(plan) == ["pretrain/lazy", "evaluate/lazy", "sparsity/lazy", "report"]


def test_what_was_made_from_an_older_generation_is_stale(tmp_path: Path) -> None:
    nodes = nodes_of()
    store = filled(tmp_path, nodes)
    newer = commit(store, nodes, "pretrain/lazy")
    plan = decide(nodes, store, Selection())
    assert running(plan) == ["evaluate/lazy", "sparsity/lazy", "report"]
    assert f"pretrain/lazy is now {newer.id}" in "; ".join(plan["evaluate/lazy"].reasons)
    assert plan["evaluate/lazy"].reasons[0].startswith("stale: made from pretrain/")
    assert plan["evaluate/standard"].action == "cached"


def test_an_interrupted_stage_says_so(tmp_path: Path) -> None:
    nodes = nodes_of()
    store = filled(tmp_path, nodes, ["tokenize"])
    entry = store.entry("pretrain", nodes["pretrain/lazy"].fingerprint)
    (entry.open_scratch({}, fresh=True) / "checkpoints" / "step-00000010").mkdir(parents=True)
    plan = decide(nodes, store, Selection())
    assert plan["pretrain/lazy"].reasons[0] == "interrupted, will resume"
    assert plan["pretrain/standard"].reasons[0] == "nothing stored for this recipe"


def test_an_interrupted_forced_stage_is_taken_up_again(tmp_path: Path) -> None:
    nodes = nodes_of()
    store = filled(tmp_path, nodes)
    entry = store.entry("pretrain", nodes["pretrain/lazy"].fingerprint)
    (entry.open_scratch({}, fresh=True) / "forced").touch()
    plan = decide(nodes, store, Selection())
    assert plan["pretrain/lazy"].reasons == ["a forced execution was interrupted, will resume"]
    assert running(plan) == ["pretrain/lazy", "evaluate/lazy", "sparsity/lazy", "report"]
    commit(store, nodes, "pretrain/lazy")
    assert "pretrain/lazy" not in running(decide(nodes, store, Selection()))


def test_damage_is_named_and_recomputed_with_everything_below(tmp_path: Path) -> None:
    nodes = nodes_of()
    store = filled(tmp_path, nodes)
    entry = store.entry("pretrain", nodes["pretrain/lazy"].fingerprint)
    (entry.path / "g0001" / "result.txt").unlink()
    plan = decide(nodes, store, Selection())
    assert running(plan) == ["pretrain/lazy", "evaluate/lazy", "sparsity/lazy", "report"]
    decision = plan["pretrain/lazy"]
    assert decision.damage is not None and decision.reasons[0] == f"damaged: {decision.damage}"
    assert "result.txt is missing" in decision.damage and decision.generation is None


@pytest.mark.parametrize("text", ["[]", "{", None])
def test_an_unreadable_manifest_is_recomputed_and_breaks_no_plan(tmp_path: Path, text: str | None) -> None:
    nodes = nodes_of()
    store = filled(tmp_path, nodes)
    path = store.entry("evaluate", nodes["evaluate/lazy"].fingerprint).path / "g0001" / MANIFEST
    path.unlink() if text is None else path.write_text(text)
    plan = decide(nodes, store, Selection())
    assert running(plan) == ["evaluate/lazy", "report"]
    assert "damaged: " in plan["evaluate/lazy"].reasons[0]
    assert explain(nodes["evaluate/lazy"], store) != []


def test_changed_content_with_the_old_mtime_needs_the_full_check(tmp_path: Path) -> None:
    nodes = nodes_of()
    store = filled(tmp_path, nodes)
    file = store.entry("tokenize", nodes["tokenize"].fingerprint).path / "g0001" / "result.txt"
    before = file.stat()
    file.write_text("TOKENIZE")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert running(decide(nodes, store, Selection())) == []
    assert running(decide(nodes, store, Selection(), full_check=True)) == ALL


# ---- selections


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(force=("evaluate/lazy",)), ["evaluate/lazy", "report"]),
        (Selection(force=("evaluate",)), ["evaluate/lazy", "evaluate/standard", "report"]),
        (Selection(force=("report",)), ["report"]),
        (Selection(force=("tokenize",)), ALL),
        (Selection(start=("sparsity",)), ["sparsity/lazy", "sparsity/standard", "report"]),
        (Selection(start=("pretrain/lazy",)), ["pretrain/lazy", "evaluate/lazy", "sparsity/lazy", "report"]),
        (Selection(start=("sparsity/lazy",), force=("evaluate/lazy",)), ["evaluate/lazy", "sparsity/lazy", "report"]),
        (Selection(only=("evaluate/lazy",)), []),
        (Selection(only=("evaluate/lazy",), force=("evaluate/lazy",)), ["evaluate/lazy"]),
        (Selection(only=("evaluate",), force=("evaluate/lazy",)), ["evaluate/lazy"]),
        (Selection(only=("evaluate/lazy",), force=("pretrain/lazy",)), ["pretrain/lazy", "evaluate/lazy"]),
        (Selection(only=("report",), force=("evaluate/lazy",)), ["evaluate/lazy", "report"]),
        (Selection(only=("tokenize", "report"), start=("sparsity/lazy",)), ["sparsity/lazy", "report"]),
    ],
)
def test_a_selection_on_a_full_store(tmp_path: Path, selection: Selection, expected: list[str]) -> None:
    nodes = nodes_of()
    assert running(decide(nodes, filled(tmp_path, nodes), selection)) == expected


def test_what_is_forced_is_marked_and_what_hangs_on_it_says_why(tmp_path: Path) -> None:
    nodes = nodes_of()
    plan = decide(nodes, filled(tmp_path, nodes), Selection(force=("pretrain/lazy",)))
    assert plan["pretrain/lazy"].forced and plan["pretrain/lazy"].reasons == ["forced"]
    assert not plan["evaluate/lazy"].forced and plan["evaluate/lazy"].reasons == ["pretrain/lazy will be recomputed"]


@pytest.mark.parametrize(
    ("stored", "only", "expected"),
    [
        ([], ("evaluate/lazy",), ["tokenize", "pretrain/lazy", "evaluate/lazy"]),
        (["tokenize"], ("evaluate/lazy",), ["pretrain/lazy", "evaluate/lazy"]),
        (["tokenize", "pretrain/lazy"], ("evaluate/lazy",), ["evaluate/lazy"]),
        (["tokenize", "pretrain/lazy"], ("evaluate",), ["evaluate/lazy", "pretrain/standard", "evaluate/standard"]),
        (["tokenize"], ("tokenize",), []),
        ([], ("tokenize",), ["tokenize"]),
    ],
)
def test_only_runs_it_and_what_it_needs_that_is_not_stored(
    tmp_path: Path, stored: list[str], only: tuple[str, ...], expected: list[str]
) -> None:
    nodes = nodes_of()
    plan = decide(nodes, filled(tmp_path, nodes, stored), Selection(only=only))
    assert sorted(running(plan)) == sorted(expected)
    assert plan["report"].action == "skipped" and plan["report"].reasons == ["not asked for by --only"]


def test_only_repairs_what_it_needs(tmp_path: Path) -> None:
    nodes = nodes_of()
    store = filled(tmp_path, nodes)
    (store.entry("tokenize", nodes["tokenize"].fingerprint).path / "g0001" / "result.txt").write_text("")
    plan = decide(nodes, store, Selection(only=("sparsity/lazy",)))
    assert running(plan) == ["tokenize", "pretrain/lazy", "sparsity/lazy"]
    assert actions(plan)["pretrain/standard"] == actions(plan)["report"] == "skipped"


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(only=("evaluat/lazy",)), r"--only evaluat/lazy: .* did you mean 'evaluate/lazy'\?"),
        (Selection(start=("sparcity",)), r"--from sparcity: .* did you mean 'sparsity'\?"),
        (Selection(force=("evaluate/lasy",)), r"--force evaluate/lasy: .* did you mean 'evaluate/lazy'\?"),
        (Selection(force=("tokenize/lazy",)), "--force tokenize/lazy: there is no such stage in this experiment"),
        (Selection(only=("",)), "--only : there is no such stage"),
        (Selection(only=("evaluate/",)), "--only evaluate/: there is no such stage"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path, selection: Selection, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        decide(nodes_of(), Store(tmp_path), selection)


# ---- variants that are the same


def twins() -> dict[str, Node]:
    return nodes_of(variants={"a": {"lr": 1e-3}, "b": {"lr": 1e-3}})


def test_identical_variants_share_recipes_and_results(tmp_path: Path) -> None:
    nodes = twins()
    assert nodes["sparsity/a"].fingerprint == nodes["sparsity/b"].fingerprint
    store = filled(tmp_path, nodes, ["tokenize", "pretrain/a", "evaluate/a", "sparsity/a", "report"])
    plan = decide(nodes, store, Selection())
    assert running(plan) == []
    assert plan["pretrain/a"].generation == plan["pretrain/b"].generation


def test_forcing_one_of_two_identical_variants_forces_their_one_result(tmp_path: Path) -> None:
    nodes = twins()
    store = filled(tmp_path, nodes, ["tokenize", "pretrain/a", "evaluate/a", "sparsity/a", "report"])
    plan = decide(nodes, store, Selection(force=("evaluate/a",)))
    assert running(plan) == ["evaluate/a", "evaluate/b", "report"]
    assert plan["evaluate/b"].forced


def test_an_experiment_is_planned_by_what_it_holds_and_not_by_its_document() -> None:
    experiment = compose(SMALL)
    other = replace(experiment, document={})
    assert build_nodes(other, SOURCE) == build_nodes(experiment, SOURCE)


class PruneConfig(StageConfig):
    keep: float = Field(0.5, description="share of the weights kept")


def test_a_stage_is_planned_from_its_row(tmp_path: Path) -> None:
    """A stage that the table does not hold: its section, its nodes, its place, and nobody else's recipe changes."""
    training = stage_row("pretrain")
    prune = StageRow(
        name="prune",
        description="pruning",
        function="nowhere:run",
        config=PruneConfig,
        facts=training.facts,
        inputs=("pretrain",),
        in_variant="nested",
    )
    rows = in_order((*STAGES, prune))
    variants = {"lazy": {"mixer": "lazy", "prune": {"keep": 0.25}}, "standard": {}}
    experiment = compose({**SMALL, "variants": variants, "resources": {"prune": {"cpus": 2}}}, rows)
    nodes = build_nodes(experiment, SOURCE)
    assert [node_id for node_id in nodes if node_id not in ALL] == ["prune/lazy", "prune/standard"]
    assert nodes["prune/lazy"].inputs == {"pretrain": "pretrain/lazy"}
    assert [nodes[f"prune/{name}"].identity for name in experiment.variants] == [{"keep": 0.25}, {}]
    before = build_nodes(compose(SMALL), SOURCE)
    assert {node_id: nodes[node_id].fingerprint for node_id in ALL} == {i: n.fingerprint for i, n in before.items()}
    held = demand_of(nodes["prune/lazy"], experiment, Capacity(4, 0, 4, 0))
    assert (held.cpus, held.gpus) == (2, 0)
    plan = decide(nodes, filled(tmp_path, before), Selection(only=("prune",)))
    assert running(plan) == ["prune/lazy", "prune/standard"]
    with pytest.raises(UserError, match=r"variants\.lazy\.prune\.kep: unknown key; did you mean 'keep'"):
        compose({**SMALL, "variants": {"lazy": {"prune": {"kep": 1}}}}, rows)
