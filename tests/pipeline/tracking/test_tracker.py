"""The MLflow side, against a real sqlite store: no step twice, resumed runs, and a server that goes away."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from lazypipe.pipeline.execution.run import make_plan
from lazypipe.pipeline.experiment.schema import load_experiment
from lazypipe.pipeline.planning.plan import Plan, Selection
from lazypipe.pipeline.store import lease
from lazypipe.pipeline.store.store import Store
from lazypipe.pipeline.tracking.tracker import Tracker
from lazypipe.pipeline.tracking.uri import probe
from lazypipe.stages.contract import UserError
from tests.pipeline.tiny import write_experiment


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tracker, Plan, Path]:
    """A started parent run of a planned experiment."""
    folder = tmp_path_factory.mktemp("tracked")
    experiment = load_experiment(write_experiment(folder))
    root = folder / "output"
    root.mkdir()
    plan, _ = make_plan(experiment, root, Selection(), full_check=False)
    tracker = Tracker(f"sqlite:///{root / 'mlflow.db'}", root, experiment, lease.myself("lazypipe run tiny.yaml"))
    tracker.start(plan, "f" * 32, "lazypipe run tiny.yaml", None)
    return tracker, plan, root


def line(step: int, **metrics: float) -> str:
    return json.dumps({"step": step, "time": 1.7e9 + step, "metrics": metrics}) + "\n"


def steps(tracker: Tracker, run_id: str, name: str = "loss") -> list[int]:
    return sorted(point.step for point in tracker.client.get_metric_history(run_id, name))


def test_only_complete_lines_are_logged_and_each_once(tracked: tuple[Tracker, Plan, Path], tmp_path: Path) -> None:
    tracker, plan, _ = tracked
    file = tmp_path / "metrics.jsonl"
    child = tracker.open_child(plan["pretrain/lazy"].node, tmp_path, tmp_path, [], None)
    tracker.pump(child)
    file.write_text(line(1, loss=3.0) + line(2, loss=2.5) + line(3, loss=2.0)[:-9])
    tracker.pump(child)
    tracker.pump(child)
    assert steps(tracker, child.run_id) == [1, 2]
    with file.open("a") as more:
        more.write(line(3, loss=2.0)[-9:] + line(3, loss=1.0) + line(2, loss=9.0))
    tracker.pump(child)
    assert steps(tracker, child.run_id) == [1, 2, 3, 3]  # one file may say a step twice; a resumed one must not


def test_a_resumed_stage_goes_on_in_its_run_without_repeating_steps(
    tracked: tuple[Tracker, Plan, Path], tmp_path: Path
) -> None:
    tracker, plan, _ = tracked
    node = plan["pretrain/standard"].node
    for name in ("g0001", "g0002"):
        (tmp_path / name).mkdir()
    first = tracker.open_child(node, tmp_path, tmp_path / "g0001", [], None)
    file = tmp_path / "g0001" / "metrics.jsonl"
    file.write_text(line(1, loss=3.0) + line(2, loss=2.5))
    tracker.pump(first)
    with file.open("a") as more:  # the driver is killed before it logs these
        more.write(line(3, loss=2.2) + line(4, loss=2.0) + line(5, loss=1.9)[:-5])
    second = tracker.open_child(node, tmp_path, tmp_path / "g0002", [tmp_path / "g0001"], None)
    assert second.run_id == first.run_id
    (tmp_path / "g0002" / "metrics.jsonl").write_text(line(3, loss=2.2) + line(4, loss=2.0) + line(5, loss=1.9))
    tracker.pump(second)
    assert steps(tracker, first.run_id) == [1, 2, 3, 4, 5]


def test_the_machine_is_watched_while_a_model_trains(
    tracked: tuple[Tracker, Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its samples go on over a resume, and their numbering hides no step of the training from the log."""
    tracker, plan, _ = tracked
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    node, name, file = plan["pretrain/lazy"].node, "system/cpu_utilization_percentage", tmp_path / "metrics.jsonl"
    seen = 0
    for step in (1, 2):
        child = tracker.open_child(node, tmp_path, tmp_path, [], None)
        deadline = time.monotonic() + 30
        while len(steps(tracker, child.run_id, name)) < seen + 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        file.write_text(line(step, loss=1.0))
        tracker.fail_child(child, "KILLED", "")
        (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
        samples = steps(tracker, child.run_id, name)
        assert samples == [*range(len(samples))] and len(samples) >= seen + 4
        assert steps(tracker, child.run_id) == [*range(1, step + 1)]
        seen = len(samples)
    assert tracker.client.get_run(child.run_id).data.metrics["system/system_memory_usage_megabytes"] > 0
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    assert tracker.open_child(node, tmp_path, tmp_path, [], None).monitor is None
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING")
    assert tracker.open_child(plan["evaluate/lazy"].node, tmp_path, tmp_path, [], None).monitor is None


def test_a_run_left_open_after_its_commit_is_completed(tracked: tuple[Tracker, Plan, Path], tmp_path: Path) -> None:
    tracker, plan, _ = tracked
    node = plan["evaluate/standard"].node
    (tmp_path / "scratch").mkdir()
    child = tracker.open_child(node, tmp_path / "scratch", tmp_path / "g0001", [], None)
    store = Store(tmp_path)
    output = store.entry("evaluate", node.fingerprint).path / "g0001"
    output.mkdir(parents=True)
    (output / "metrics.jsonl").write_text(line(1, loss=3.0))
    body = {"fingerprint": node.fingerprint, "config": {}, "inputs": {}, "metrics": {"perplexity": 20.0}, "facts": {}}
    generation = store.entry("evaluate", node.fingerprint).commit(
        "g0001", {**body, "tracking": {"uri": tracker.uri, "run_id": child.run_id}}
    )
    tracker.link(node, generation)  # the driver was killed before it could say so to MLflow
    run = tracker.client.get_run(child.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics == {"loss": 3.0, "perplexity": 20.0}
    assert tracker.client.get_run(tracker.parent_id).data.tags[f"lazypipe.cached.{node.id}"].startswith(generation.id)


def test_a_server_that_goes_away_costs_no_stage(
    tracked: tuple[Tracker, Plan, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracker, plan, _ = tracked
    file = tmp_path / "metrics.jsonl"
    child = tracker.open_child(plan["sparsity/lazy"].node, tmp_path, tmp_path, [], None)
    file.write_text(line(1, loss=3.0))

    def dead(*_: Any, **__: Any) -> None:
        raise MlflowException("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "log_batch", dead)
        patch.setattr(tracker.client, "create_run", dead)
        tracker.pump(child)
        lost = tracker.open_child(plan["evaluate/lazy"].node, tmp_path / "no", tmp_path, [], None)
        tracker.pump(lost)
        tracker.fail_child(lost, "FAILED", "boom")
    assert "connection refused" in capsys.readouterr().err and lost.run_id == ""
    tracker.pump(child)  # the server is back
    assert steps(tracker, child.run_id) == [1]


def test_an_interrupted_parent_is_taken_up_and_a_living_one_is_not(tracked: tuple[Tracker, Plan, Path]) -> None:
    tracker, plan, root = tracked
    other = Tracker(tracker.uri, root, tracker.experiment, lease.myself("lazypipe run tiny.yaml"))
    other.start(plan, "f" * 32, "again", None)
    assert other.parent_id != tracker.parent_id  # this test's own process is alive and holds the first
    other.finish("KILLED", None)
    third = Tracker(tracker.uri, root, tracker.experiment, lease.myself("lazypipe run tiny.yaml"))
    third.start(plan, "f" * 32, "and again", None)
    assert third.parent_id == other.parent_id
    assert third.client.get_run(third.parent_id).info.status == "RUNNING"


def test_a_training_run_whose_machine_cannot_be_watched_is_logged_all_the_same(
    tracked: tuple[Tracker, Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(*_: Any) -> None:
        raise MlflowException("no such sensor")

    tracker, plan, _ = tracked
    monkeypatch.setattr("lazypipe.pipeline.tracking.tracker.watch_machine", blind)
    child = tracker.open_child(plan["pretrain/lazy"].node, tmp_path, tmp_path, [], None)
    (tmp_path / "metrics.jsonl").write_text(line(1, loss=3.0))
    tracker.pump(child)
    assert steps(tracker, child.run_id) == [1]


def test_the_end_of_a_stage_is_said_again_when_the_server_did_not_take_it(
    tracked: tuple[Tracker, Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, plan, root = tracked
    tracker = Tracker(first.uri, root, first.experiment, lease.myself("lazypipe run tiny.yaml"))
    tracker.start(plan, "e" * 32, "again", None)
    child = tracker.open_child(plan["evaluate/lazy"].node, tmp_path, tmp_path, [], None)
    honest, refused = tracker.client.set_terminated, iter([True, True])

    def busy(*arguments: Any, **keywords: Any) -> None:
        if next(refused, False):
            raise MlflowException("database is locked")
        honest(*arguments, **keywords)

    monkeypatch.setattr(tracker.client, "set_terminated", busy)
    tracker.fail_child(child, "KILLED", "")
    assert tracker.client.get_run(child.run_id).info.status == "RUNNING"
    tracker.finish("KILLED", None)
    assert tracker.client.get_run(child.run_id).info.status == "KILLED"
    assert tracker.client.get_run(tracker.parent_id).info.status == "KILLED"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "http://127.0.0.1:9", "http://no.such.host.invalid"])
def test_tracking_that_cannot_work_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"MLflow tracking URI"):
        probe(uri)
