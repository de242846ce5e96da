"""Runs that survive: the driver killed outright, and asked to stop."""

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

from tests.pipeline.tiny import (
    FinishedRun,
    clean_environment,
    current_manifest,
    lazypipe,
    mlflow_runs,
    write_experiment,
)

STEPS = "pretrain.steps=400"


def start(config: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lazypipe", "run", str(config), STEPS, *arguments]
    return subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def wait_for_checkpoint(root: Path, process: subprocess.Popen[bytes], timeout: float = 120) -> Path:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = sorted(root.glob("store/pretrain/*/scratch/checkpoints/step-*/manifest.json"))
        if found:
            return found[-1]
        assert process.poll() is None, process.stdout and process.stdout.read().decode()
        time.sleep(0.005)
    raise AssertionError("no checkpoint appeared")


def weights(root: Path, variant: str) -> bytes:
    manifest = current_manifest(root, "pretrain", variant)
    return next(
        (root / "store" / "pretrain").glob(f"{manifest['fingerprint'][:12]}/*/checkpoint/model.safetensors")
    ).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, finished_run: FinishedRun) -> Path:
    """The same experiment without accidents, in one process."""
    root = tmp_path_factory.mktemp("undisturbed") / "output"
    arguments = ("run", finished_run.config, STEPS, "--only", "pretrain", "--root", root, "--local")
    result = lazypipe(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return root


def test_a_killed_driver_resumes_bitwise(tmp_path: Path, finished_run: FinishedRun, undisturbed: Path) -> None:
    root = tmp_path / "output"
    process = start(finished_run.config, "--only", "pretrain", "--root", str(root))
    wait_for_checkpoint(root, process)
    # Ray's own agents notice a dead node in their own time (up to a minute); what computes must end at once.
    family = [p for p in psutil.Process(process.pid).children(recursive=True) if "Agent" not in p.cmdline()[0]]
    assert len(family) > 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, f"still running after the driver was killed: {[p.cmdline()[:3] for p in alive]}"

    result = lazypipe("run", finished_run.config, STEPS, "--only", "pretrain", "--root", root, "--local")
    assert result.returncode == 0, result.stdout + result.stderr
    manifests = [current_manifest(root, "pretrain", variant) for variant in ("lazy", "standard")]
    resumed = [m for m in manifests if m["resumed_from"] > 0]
    assert resumed and all(m["steps_executed"] == 400 - m["resumed_from"] for m in manifests)
    for variant in ("lazy", "standard"):
        assert weights(root, variant) == weights(undisturbed, variant), variant
    runs = mlflow_runs(root)
    assert sorted(r.info.run_name for r in runs) == ["pretrain/lazy", "pretrain/standard", "tiny", "tokenize"]
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    for run in runs:
        if run.info.run_name.startswith("pretrain"):
            steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
            assert sorted(steps) == list(range(1, 401)), "every step once, in one run"


def test_an_interrupt_saves_and_leaves_the_run_resumable(tmp_path: Path) -> None:
    config = write_experiment(tmp_path)
    root = tmp_path / "output"
    process = start(config, "--only", "pretrain/lazy", "--local", "pretrain.steps=4000")
    wait_for_checkpoint(root, process)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output.decode()
    runs = {r.info.run_name: r.info.status for r in mlflow_runs(root)}
    assert runs["pretrain/lazy"] == "KILLED" and runs["tiny"] == "KILLED" and runs["tokenize"] == "FINISHED"
    status = json.loads(lazypipe("status", config, "pretrain.steps=4000", "--json").stdout)["stages"]
    states = {(row["stage"], row["variant"]): row["state"] for row in status}
    assert states["pretrain", "lazy"] == "interrupted"
    assert not list(root.glob("store/*/*/lease.json"))


@pytest.mark.long
def test_a_stage_process_that_is_terminated_saves_and_the_run_is_resumable(tmp_path: Path) -> None:
    """SIGTERM to the Ray worker that trains, not to the driver: as when its node is drained."""
    config = write_experiment(tmp_path)
    root = tmp_path / "output"
    process = start(config, "--only", "pretrain/lazy", "pretrain.steps=100000", "pretrain.checkpoint_every=100000")
    try:
        deadline = time.monotonic() + 120
        while not (logged := list(root.glob("store/pretrain/*/g0001/metrics.jsonl"))) or not logged[0].read_bytes():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        trainers = [
            p for p in family if p.name().startswith("ray::pretrain") or "ray::pretrain" in " ".join(p.cmdline())
        ]
        assert len(trainers) == 1
        trainers[0].terminate()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output.decode()
    saved = list(root.glob("store/pretrain/*/scratch/checkpoints/step-*/manifest.json"))
    assert len(saved) == 1, output.decode()
    runs = {r.info.run_name: r.info.status for r in mlflow_runs(root)}
    assert runs["pretrain/lazy"] == "KILLED"
