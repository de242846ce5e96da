"""`plan --explain` and the notes beside cached stages: which field differs, from what to what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lazypipe.pipeline.planning.code_version import PACKAGE
from lazypipe.pipeline.planning.plan import Node, Selection, decide, explain
from lazypipe.pipeline.planning.stage_sources import SyntaxTrees, stage_digest
from lazypipe.pipeline.store.store import MANIFEST, Store
from tests.pipeline.store.filled_store import SMALL, commit, filled, nodes_of, running


def explained(tmp_path: Path, node_id: str, before: Mapping[str, Node], after: Mapping[str, Node]) -> list[str]:
    return explain(after[node_id], filled(tmp_path, before))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {"lr": 1e-3}, "pretrain.lr: 0.002 -> 0.001"),
        ({"lr": 1e-3}, {}, "pretrain.lr: 0.001 -> 0.002"),
        ({"lr": 1e-3}, {"lr": 1e-4}, "pretrain.lr: 0.001 -> 0.0001"),
        ({}, {"dtype": "bfloat16"}, "pretrain.dtype: 'float32' -> 'bfloat16'"),
    ],
)
def test_a_changed_pretrain_field_is_named_with_both_values(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], expected: str
) -> None:
    old, new = (nodes_of(pretrain={**SMALL["pretrain"], **fields}) for fields in (before, after))
    lines = explained(tmp_path, "pretrain/lazy", old, new)
    assert lines == [expected, f"(compared with pretrain/{old['pretrain/lazy'].fingerprint[:12]}/g0001)"]


def test_a_changed_model_field_is_named_as_the_user_writes_it(tmp_path: Path) -> None:
    after = nodes_of(model={**SMALL["model"], "num_layers": 6})
    lines = explained(tmp_path, "pretrain/standard", nodes_of(), after)
    assert lines[0] == "model.num_layers: 4 -> 6" and len(lines) == 2


@pytest.mark.parametrize(
    ("sections", "node_id", "expected"),
    [
        ({"evaluate": {"temperature": 0.5}}, "evaluate/lazy", "evaluate.temperature: 0.8 -> 0.5"),
        (
            {"evaluate": {"extrapolation": {"context_lengths": [8]}}},
            "evaluate/lazy",
            "evaluate.extrapolation.context_lengths: [64, 128, 256, 512] -> [8]",
        ),
        ({"sparsity": {"windows": 3}}, "sparsity/standard", "sparsity.windows: 16 -> 3"),
        ({"tokenize": {"validation_fraction": 0.1}}, "tokenize", "tokenize.validation_fraction: 0.05 -> 0.1"),
        (
            {"tokenize": {"tokenizer": {"kind": "train", "vocab_size": 300}}},
            "tokenize",
            "tokenize.tokenizer.vocab_size: 2048 -> 300",
        ),
        (
            {"tokenize": {"source": {"kind": "files", "paths": ["/a"]}}},
            "tokenize",
            "tokenize.source.kind: 'embedded' -> 'files'",
        ),
    ],
)
def test_a_change_from_all_defaults_and_back_names_that_field_alone(
    tmp_path: Path, sections: dict[str, Any], node_id: str, expected: str
) -> None:
    plain, changed = nodes_of(), nodes_of(**sections)
    assert explained(tmp_path / "there", node_id, plain, changed)[:-1] == [expected]
    key, _, values = expected.partition(": ")
    old, _, new = values.partition(" -> ")
    assert explained(tmp_path / "back", node_id, changed, plain)[:-1] == [f"{key}: {new} -> {old}"]


def test_changed_source_content_is_named_and_both_sides_can_be_told_apart(tmp_path: Path) -> None:
    files = [{"format": "text", "sha256": "ab" * 32}, {"format": "text", "sha256": "cd" * 32}]
    one, two = (nodes_of(source={"tokenize": {"source": {"files": f}, "tokenizer": {}}}) for f in (files, files[::-1]))
    line = explained(tmp_path, "tokenize", one, two)[0]
    key, _, values = line.partition(": ")
    old, new = values.split(" -> ")
    assert key == "tokenize.source.files (content)" and old != new and old.startswith("2 values, digest ")


def test_a_stage_whose_input_changed_says_so(tmp_path: Path) -> None:
    after = nodes_of(pretrain={**SMALL["pretrain"], "lr": 1e-3})
    lines = explained(tmp_path, "evaluate/lazy", nodes_of(), after)
    assert len(lines) == 1 and lines[0].endswith("but an input differs") and "evaluate/" in lines[0]


def test_a_new_stage_version_is_named(tmp_path: Path) -> None:
    nodes = nodes_of()
    store = filled(tmp_path, nodes, ["tokenize"])
    old = store.entry("tokenize", nodes["tokenize"].fingerprint)
    manifest = json.loads((old.path / "g0001" / MANIFEST).read_text())
    (old.path / "g0001" / MANIFEST).write_text(json.dumps(manifest | {"stage_version": 0, "fingerprint": "0" * 64}))
    assert explain(nodes["tokenize"], store)[0] == "tokenize: STAGE_VERSION 0 -> 1"


def test_without_an_earlier_run_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    assert explain(nodes_of()["tokenize"], Store(tmp_path)) == []


def test_the_nearest_recipe_is_taken_and_of_two_the_same_variant(tmp_path: Path) -> None:
    before = nodes_of()
    store = filled(tmp_path, before)
    variants = {"lazy": {"mixer": "lazy", "lr": 1e-3}, "standard": {"lr": 1e-3}}
    after = nodes_of(variants=variants)
    for variant in ("lazy", "standard"):
        lines = explain(after[f"pretrain/{variant}"], store)
        assert lines[0] == "pretrain.lr: 0.002 -> 0.001" and len(lines) == 2
        assert before[f"pretrain/{variant}"].fingerprint[:12] in lines[-1]


def test_a_renamed_variant_is_cached_and_only_the_report_is_made_again(tmp_path: Path) -> None:
    store = filled(tmp_path, nodes_of())
    nodes = nodes_of(variants={"elastic": {"mixer": "lazy"}, "standard": {}})
    assert running(decide(nodes, store, Selection())) == ["report"]
    assert explain(nodes["report"], store)[0].endswith("but an input differs")


def test_a_cached_stage_that_would_run_differently_now_has_a_note(tmp_path: Path) -> None:
    store = filled(tmp_path, nodes_of())
    nodes = nodes_of(pretrain={**SMALL["pretrain"], "kernel": "blockwise", "checkpoint_every": 7})
    plan = decide(nodes, store, Selection())
    assert running(plan) == []
    notes = "\n".join(plan["pretrain/lazy"].notes)
    assert "ran with kernel='auto', now 'blockwise'" in notes and "checkpoint_every=100, now 7" in notes
    assert plan["tokenize"].notes == []


def test_moved_files_are_no_difference_worth_a_note(tmp_path: Path) -> None:
    old, new = (nodes_of(tokenize={"source": {"kind": "files", "paths": [path]}}) for path in ("/a/*.txt", "/b/*.txt"))
    plan = decide(new, filled(tmp_path, old), Selection())
    assert running(plan) == [] and plan["tokenize"].notes == []


def test_changed_code_is_noted_with_the_commit_it_ran_at(tmp_path: Path) -> None:
    nodes = nodes_of()
    store = Store(tmp_path)
    for node_id in ("tokenize", "pretrain/lazy"):
        commit(store, nodes, node_id, code={"commit": "c0ffee", "sources_sha256": "", "stage_sha256": "another"})
    pretrain = nodes["pretrain/standard"]
    same = stage_digest(PACKAGE, pretrain.row.function, SyntaxTrees(None))
    commit(store, nodes, pretrain.id, code={"commit": "c0ffee", "sources_sha256": "", "stage_sha256": same})
    plan = decide(nodes, store, Selection())
    note = ["the code of this stage has changed since (c0ffee)"]
    assert {node_id: d.notes for node_id, d in plan.items() if d.action == "cached"} == {
        "tokenize": note,
        "pretrain/lazy": note,
        "pretrain/standard": [],
    }
    assert (tmp_path / "cache" / "syntax_trees.json").is_file()


def test_a_manifest_that_holds_the_digest_of_all_sources_only_says_nothing_of_its_stage(tmp_path: Path) -> None:
    """As written before there was a digest per stage: a change of any stage's code would mark every result."""
    nodes = nodes_of()
    store = Store(tmp_path)
    old = {"commit": "c0ffee", "dirty": False, "diff_sha256": None, "sources_sha256": "ab" * 32}
    commit(store, nodes, "tokenize", code=old)
    decision = decide(nodes, store, Selection())["tokenize"]
    assert (decision.action, decision.notes) == ("cached", [])
