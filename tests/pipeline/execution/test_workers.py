"""Worker ranges, how many fit a cluster, and a group of Ray Train that loses a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lazypipe.pipeline.execution.backends import Capacity, demand_of
from lazypipe.pipeline.execution.ray_train import _cause
from lazypipe.pipeline.experiment.resources import WorkerResources
from lazypipe.pipeline.experiment.schema import Experiment, load_experiment
from lazypipe.pipeline.planning.plan import Node
from lazypipe.stages.contract import UserError
from lazypipe.stages.registry import stage_row
from tests.pipeline.tiny import clean_environment, current_manifest, lazypipe, mlflow_runs, write_experiment


def experiment(folder: Path, *overrides: str) -> Experiment:
    return load_experiment(write_experiment(folder), overrides)


def node(found: Experiment) -> Node:
    return Node("pretrain/lazy", stage_row("pretrain"), "lazy", found.configs["pretrain/lazy"], {}, {}, {}, "0" * 64)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("2", (2, 2)), ("{min: 1, max: 4}", (1, 4)), ("{min: 3, max: 3}", (3, 3)), ("{max: 4, min: 2}", (2, 4))],
)
def test_workers_are_a_number_or_a_range(tmp_path: Path, written: str, expected: tuple[int, int]) -> None:
    resources = experiment(tmp_path, f"resources.pretrain.workers={written}").resources["pretrain"]
    assert isinstance(resources, WorkerResources)
    assert resources.worker_range == expected
    assert WorkerResources.model_validate(resources.model_dump(mode="json")) == resources
    assert not resources.in_task


def test_a_range_of_one_is_one_worker(tmp_path: Path) -> None:
    resources = experiment(tmp_path, "resources.pretrain.workers={min: 1, max: 1}").resources["pretrain"]
    assert isinstance(resources, WorkerResources) and resources.in_task


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("workers=-1", "resources.pretrain.workers: must be greater than 0, found -1"),
        ("workers=true", "resources.pretrain.workers: must be a number such as 2, or a range"),
        ("workers='2'", "resources.pretrain.workers: must be a number such as 2, or a range"),
        ("workers={min: 2}", "or a range such as {min: 1, max: 4}, found {'min': 2}"),
        ("workers={min: 4, max: 2}", "must have whole numbers 1 <= min <= max, found min=4, max=2"),
        ("workers={min: 1, max: 2.5}", "1 <= min <= max, found min=1, max=2.5"),
        ("placement=STRICT", "resources.pretrain.placement: must be 'PACK' or 'SPREAD', found 'STRICT'"),
    ],
)
def test_what_is_no_number_of_workers_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as refusal:
        experiment(tmp_path, f"resources.pretrain.{override}")
    assert expected in str(refusal.value)


def test_a_range_holds_what_there_is_room_for(tmp_path: Path) -> None:
    found = experiment(tmp_path, "resources.pretrain={workers: {min: 2, max: 8}, cpus_per_worker: 3}")
    four_nodes = Capacity(16, 0, 4, 0, nodes=((4, 0),) * 4)
    assert demand_of(node(found), found, four_nodes).cpus == 12  # one worker of 3 cores on each node of 4
    assert demand_of(node(found), found, Capacity(64, 0, 64, 0, nodes=((64, 0),))).cpus == 24
    with pytest.raises(UserError, match="2 workers x 3 = 6 CPU asked for, but 4 present"):
        demand_of(node(found), found, Capacity(4, 0, 4, 0, nodes=((4, 0),)))


def test_workers_that_only_fit_across_two_nodes_are_refused(tmp_path: Path) -> None:
    """9 cores for 3 workers of 3 are there, but 4 + 4 + 1: Ray Train would wait for ever."""
    found = experiment(tmp_path, "resources.pretrain={workers: 3, cpus_per_worker: 3}")
    with pytest.raises(UserError, match="3 workers of 3 CPU and 0 GPU, 3 workers asked for, but 2 present"):
        demand_of(node(found), found, Capacity(9, 0, 4, 0, nodes=((4, 0), (4, 0), (1, 0))))


def test_the_dead_are_named_before_those_who_lost_them() -> None:
    ends = {0: RuntimeError("Connection closed by baseline"), 1: RuntimeError("The actor died unexpectedly\nmore")}
    assert _cause(ends) == "worker 1: The actor died unexpectedly; worker 0: Connection closed by baseline"
    unwell = RuntimeError("A worker health check failed.")
    unwell.health_check_failure = ends[1]  # type: ignore[attr-defined]
    assert _cause({0: unwell}) == "worker 0: The actor died unexpectedly"


# Loaded by every Python process that finds it in PYTHONPATH: rank 1 warns after step 5, and so does a library there.
WARNING_WORKER = """
import warnings
from lazypipe.stages.contract import Context
progress = Context.progress
def warn_at_step_5(self, done, *others, **numbers):
    if self.rank == 1 and done == 5:
        self.warn("the disk is slow", step=5)
        warnings.warn("a library says")
    progress(self, done, *others, **numbers)
Context.progress = warn_at_step_5
"""


@pytest.mark.long
def test_a_group_that_loses_a_worker_goes_on_and_says_so(tmp_path: Path) -> None:
    """kill -9 of one of two Ray Train workers: every step is logged once, and the run knows of two attempts.

    What rank 1 warned of before is on the screen while training goes on, and in the manifest and the report.
    """
    (tmp_path / "sitecustomize.py").write_text(WARNING_WORKER)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    config, root = write_experiment(tmp_path), tmp_path / "output"
    overrides = ["pretrain.steps=600", "pretrain.checkpoint_every=50", "resources.pretrain.workers={min: 1, max: 2}"]
    overrides += ["pretrain.reduction=ordered", "~variants.standard"]
    command = [sys.executable, "-m", "lazypipe", "run", str(config), *overrides, "--only", "pretrain"]
    process = subprocess.Popen(
        command,
        env=clean_environment(PYTHONPATH=path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    warned = {
        "warning: pretrain/lazy: step 5: the disk is slow (rank 1)",
        "warning: pretrain/lazy: a library says (rank 1)",
    }
    shown: list[str] = []
    while not warned <= set(shown):
        line = process.stdout.readline().decode()
        assert line, "".join(shown)
        shown.append(line.rstrip("\n"))
    (lines,) = root.glob("store/pretrain/*/scratch/warnings-00001.jsonl")
    assert time.time() - json.loads(lines.read_text().splitlines()[0])["time"] < 10
    deadline = time.monotonic() + 150
    while not list(root.glob("store/pretrain/*/scratch/checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline and process.poll() is None, process.stdout and process.stdout.read().decode()
        time.sleep(0.05)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in p.name()]
    workers = workers or [
        p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
    ]
    assert len(workers) == 2
    os.kill(workers[-1].pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said.decode()
    assert "warning: pretrain" not in said.decode(), "each is shown once"

    manifest = current_manifest(root, "pretrain", "lazy")
    first, second = manifest["facts"]["attempts"]
    assert (first["attempt"], first["from_step"], first["workers"], first["cause"]) == (1, 0, 2, None)
    assert second["from_step"] == manifest["resumed_from"] > 0 and second["workers"] in (1, 2)
    assert second["cause"].startswith("worker ") and "died" in second["cause"]

    from mlflow import MlflowClient

    (run,) = [r for r in mlflow_runs(root) if r.info.run_name == "pretrain/lazy"]
    assert run.data.tags["lazypipe.attempts"] == "2"
    assert second["cause"] in run.data.tags["lazypipe.attempt.2"]
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, 601)), "every step once"

    assert {(w["message"], w["step"], *w["ranks"]) for w in manifest["warnings"]} >= {
        ("the disk is slow", 5, 1),
        ("a library says", None, 1),
    }
    result = lazypipe("run", config, *overrides, "--local")
    assert result.returncode == 0, result.stdout + result.stderr
    (report,) = root.glob("store/report/*/*/report.md")
    assert "* pretrain/lazy: step 5: the disk is slow (rank 1)" in report.read_text()
