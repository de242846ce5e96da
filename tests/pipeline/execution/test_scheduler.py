"""The walker with stages that take no time: order, admission, failures, twins and leftovers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lazypipe.pipeline.execution import scheduler
from lazypipe.pipeline.execution.backends import Capacity, Demand
from lazypipe.pipeline.execution.execute import StageTask
from lazypipe.pipeline.planning.plan import Selection
from lazypipe.pipeline.store.lease import living_holder
from lazypipe.pipeline.store.store import Store
from lazypipe.stages.contract import Context, UserError
from lazypipe.stages.warning_lines import read_warnings
from tests.pipeline.execution.fake_scheduler import FakeBackend, commit_task, fail, make_walk, small_nodes, walked
from tests.pipeline.store.filled_store import ALL, filled

LAZY = ["pretrain/lazy", "evaluate/lazy", "sparsity/lazy"]
STANDARD = ["pretrain/standard", "evaluate/standard", "sparsity/standard"]

# ---- the plain way


def test_every_stage_runs_once_after_its_inputs_and_is_committed(tmp_path: Path) -> None:
    done = walked(Store(tmp_path), FakeBackend())
    assert set(done.states().values()) == {"done"}
    started = done.backend.started
    assert sorted(started) == sorted(ALL) and started[0] == "tokenize" and started[-1] == "report"
    for node in done.nodes.values():
        assert all(started.index(origin) < started.index(node.id) for origin in node.inputs.values())
        generation = done.store.entry(node.stage, node.fingerprint).current()
        assert generation is not None and generation == done.outcomes[node.id].generation
        assert list(generation.manifest["inputs"]) == sorted(node.inputs)
    assert [call[1] for call in done.tracker.calls if call[0] == "finish"] == started
    assert ("corpus", "run of pretrain/lazy", "training") in done.tracker.calls
    assert ("corpus", "run of evaluate/lazy", "evaluation") in done.tracker.calls


def test_the_second_walk_starts_nothing(tmp_path: Path) -> None:
    walked(Store(tmp_path), FakeBackend())
    again = walked(Store(tmp_path), FakeBackend())
    assert again.backend.started == [] and set(again.states().values()) == {"cached"}


def test_a_task_says_all_an_execution_needs(tmp_path: Path) -> None:
    sections = {"resources": {"evaluate": {"threads": 3}, "pretrain": {"cpus": 2}}}
    done = walked(Store(tmp_path), FakeBackend(), sections=sections)
    task = done.backend.tasks["evaluate/lazy"]
    assert (task.stage, task.variant, task.experiment, task.generation) == ("evaluate", "lazy", "small", "g0001")
    assert task.input_names == ("tokenize", "pretrain") and task.threads == 3
    assert task.fingerprint == done.nodes["evaluate/lazy"].fingerprint
    assert task.tracking == {"uri": "fake:", "run_id": "run of evaluate/lazy", "parent_run_id": "parent"}
    assert done.backend.tasks["pretrain/lazy"].threads == 2
    json.dumps([dict(task.config), dict(task.identity), dict(task.resources)])


def test_skipped_stages_are_left_alone(tmp_path: Path) -> None:
    done = walked(Store(tmp_path), FakeBackend(), selection=Selection(only=("pretrain/lazy",)))
    assert done.backend.started == ["tokenize", "pretrain/lazy"]
    assert done.states()["report"] == done.states()["pretrain/standard"] == "skipped"


def test_a_forced_stage_gets_a_new_generation_and_so_does_what_hangs_on_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    walked(store, FakeBackend())
    done = walked(store, FakeBackend(), selection=Selection(force=("evaluate/lazy",)))
    assert done.backend.started == ["evaluate/lazy", "report"]
    assert {t.generation for t in done.backend.tasks.values()} == {"g0002"}
    generation = done.outcomes["report"].generation
    assert generation is not None
    assert generation.manifest["inputs"]["evaluate/lazy"]["generation"].endswith("/g0002")


# ---- admission


def test_stages_share_the_machine_and_never_more_than_it_has(tmp_path: Path) -> None:
    backend = walked(Store(tmp_path), FakeBackend()).backend  # training holds both cores, evaluation one
    assert not any({"pretrain/lazy", "pretrain/standard"} <= together for together in backend.together)
    assert any(len(together) == 2 for together in backend.together)


def test_smaller_trainings_run_side_by_side(tmp_path: Path) -> None:
    sections = {"resources": {"pretrain": {"cpus": 1}}}
    backend = walked(Store(tmp_path), FakeBackend(), sections=sections).backend
    assert {"pretrain/lazy", "pretrain/standard"} in backend.together


def test_trainers_outside_their_task_are_admitted_by_their_workers(tmp_path: Path) -> None:
    sections = {"resources": {"pretrain": {"workers": 2}}}
    backend = walked(Store(tmp_path), FakeBackend(cpus=3), sections=sections).backend
    assert not any({"pretrain/lazy", "pretrain/standard"} <= together for together in backend.together)


def test_workers_of_a_fraction_of_a_gpu_are_counted_without_losing_one_to_rounding() -> None:
    assert [Capacity(8, 1, 8, 1).workers(1, gpus) for gpus in (0.1, 0.2, 0.5, 0.3, 0)] == [8, 5, 2, 3, 8]
    assert Capacity(8, 2, 4, 1, nodes=((4.0, 1.0), (4.0, 1.0))).workers(3, 0) == 2


def test_what_the_machine_cannot_hold_is_refused_before_anything_starts(tmp_path: Path) -> None:
    backend = FakeBackend()
    sections = {"resources": {"evaluate": {"gpus": 1}}}
    with pytest.raises(UserError, match=r"resources\.evaluate\.gpus 1 GPU on one node, asked for, but 0 present"):
        walked(Store(tmp_path), backend, sections=sections)
    assert backend.started == []


# ---- failures


def test_a_failure_blocks_its_children_and_leaves_its_siblings_alone(tmp_path: Path) -> None:
    error = RuntimeError("loss is not finite\nat step 7")
    done = walked(Store(tmp_path), FakeBackend({"pretrain/lazy": fail(error)}))
    states = done.states()
    assert states["pretrain/lazy"] == "failed" and {states[i] for i in ("tokenize", *STANDARD)} == {"done"}
    assert states["evaluate/lazy"] == states["sparsity/lazy"] == states["report"] == "blocked"
    outcome = done.outcomes["pretrain/lazy"]
    assert outcome.error is error and outcome.traceback == "Traceback of pretrain/lazy"
    assert re.search(r"pretrain/lazy: failed in \d+s: loss is not finite\n", done.said)
    assert "evaluate/lazy: blocked: needs pretrain/lazy" in done.said
    assert ("fail", "run of pretrain/lazy", "FAILED", "Traceback of pretrain/lazy") in done.tracker.calls
    entry = done.store.entry("pretrain", done.nodes["pretrain/lazy"].fingerprint)
    assert entry.current() is None and not list(entry.path.glob("g*")), "no half-written generation stays"

    again = walked(done.store, FakeBackend())
    assert sorted(again.backend.started) == sorted([*LAZY, "report"])


def test_a_refusal_at_the_start_is_a_failure_of_that_stage_alone(tmp_path: Path) -> None:
    class Refusing(FakeBackend):
        def submit(self, task: StageTask, input_paths: Sequence[str], demand: Demand) -> None:
            if task.node_id == "pretrain/lazy":
                raise UserError("resources.pretrain.workers=2: --local trains in one process")
            super().submit(task, input_paths, demand)

    done = walked(Store(tmp_path), Refusing())
    assert isinstance(done.outcomes["pretrain/lazy"].error, UserError)
    assert done.states()["evaluate/lazy"] == "blocked" and done.states()["sparsity/standard"] == "done"


def test_any_other_error_at_the_start_ends_the_walk_and_frees_its_leases(tmp_path: Path) -> None:
    class Broken(FakeBackend):
        def submit(self, *_: Any) -> None:
            raise ConnectionError("the cluster is gone")

    store = Store(tmp_path)
    walk, _, _, nodes = make_walk(store, Broken())
    with pytest.raises(ConnectionError):
        walk.run()
    assert living_holder(store.entry("tokenize", nodes["tokenize"].fingerprint).path) is None


# ---- warnings


def test_warnings_are_shown_once_each_while_the_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by rank 1, then by rank 0 too; of the last one, written just before the commit, the manifest knows."""
    monkeypatch.setattr(scheduler, "PUMP_S", 0.01)
    seen: list[str] = []

    def warn_and_train(_backend: FakeBackend, task: StageTask, paths: Sequence[str]) -> str | None:
        scratch = task.entry / "scratch"
        if not seen:
            Context(task.entry, scratch, rank=1).write_warning("skipped: loss nan", 5)
            seen.append(out.getvalue())
        if "warning" not in out.getvalue():
            return None
        seen.append(out.getvalue())
        Context(task.entry, scratch).write_warning("skipped: loss nan", 5)
        Context(task.entry, scratch).write_warning("the last word")
        return commit_task(task, paths, warnings=read_warnings(scratch))

    walk, _, out, _ = make_walk(Store(tmp_path), FakeBackend({"pretrain/lazy": warn_and_train}))
    walk.run()
    assert "warning: pretrain/lazy: step 5: skipped: loss nan (rank 1)\n" in seen[1]
    assert "pretrain/lazy: done" not in seen[1]
    assert out.getvalue().count("skipped: loss nan") == 1
    assert out.getvalue().count("warning: pretrain/lazy: the last word\n") == 1


# ---- identical variants

TWINS = {"variants": {"a": {"lr": 1e-3}, "b": {"lr": 1e-3}}, "resources": {"pretrain": {"cpus": 1}}}


@pytest.mark.parametrize("cpus", [2.0, 16.0])
@pytest.mark.parametrize("force", [(), ("pretrain/a",), ("tokenize",)])
def test_variants_with_the_same_recipe_run_once(tmp_path: Path, force: tuple[str, ...], cpus: float) -> None:
    store = Store(tmp_path)
    if force:
        walked(store, FakeBackend(cpus=cpus), sections=TWINS)
    done = walked(store, FakeBackend(cpus=cpus), sections=TWINS, selection=Selection(force=force))
    assert sum(node_id.startswith("pretrain/") for node_id in done.backend.started) == 1
    assert sum(node_id.startswith("evaluate/") for node_id in done.backend.started) == 1
    for stage in ("pretrain", "evaluate", "sparsity"):
        assert done.outcomes[f"{stage}/a"].generation == done.outcomes[f"{stage}/b"].generation
        assert {done.states()[f"{stage}/a"], done.states()[f"{stage}/b"]} == {"done", "cached"}
    assert ("link", "pretrain/b", done.outcomes["pretrain/b"].generation.id) in done.tracker.calls
    assert walked(store, FakeBackend(), sections=TWINS).backend.started == []


# ---- damage and leftovers


def test_damage_that_only_a_sha256_shows_is_recomputed(tmp_path: Path) -> None:
    nodes = small_nodes()
    store = filled(tmp_path, nodes)
    file = store.entry("pretrain", nodes["pretrain/lazy"].fingerprint).path / "g0001" / "result.txt"
    before = file.stat()
    file.write_text("PRETRAIN/LAZY")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    done = walked(store, FakeBackend(), full_check=True)
    assert done.backend.started[0] == "pretrain/lazy" and done.states()["pretrain/lazy"] == "done"
    generation = done.outcomes["pretrain/lazy"].generation
    assert generation is not None and generation.problem(full=True) is None


def test_a_half_written_generation_is_removed_with_a_warning_and_its_checkpoints_stay(tmp_path: Path) -> None:
    nodes = small_nodes()
    store = filled(tmp_path, nodes, ["tokenize"])
    entry = store.entry("pretrain", nodes["pretrain/lazy"].fingerprint)
    (entry.path / "g0001").mkdir(parents=True)
    (entry.path / "g0001" / "metrics.jsonl").write_text("{}")
    corpus = store.entry("tokenize", nodes["tokenize"].fingerprint).current()
    assert corpus is not None
    scratch = entry.open_scratch({"tokenize": corpus.id}, fresh=False)
    (scratch / "checkpoints" / "step-00000010").mkdir(parents=True)
    resumed: list[Any] = []

    def resume(_backend: FakeBackend, task: StageTask, paths: Sequence[str]) -> str:
        resumed.extend(p.name for p in (task.entry / "scratch" / "checkpoints").iterdir())
        return commit_task(task, paths)

    done = walked(store, FakeBackend({"pretrain/lazy": resume}))
    assert "warning: pretrain/lazy: removed the half-written generation g0001" in done.said
    assert resumed == ["step-00000010"] and done.states()["pretrain/lazy"] == "done"
