"""`make chaos SEED=n`: whole runs, killed and damaged at random points, end as the undisturbed ones, bit for bit.

Every accident follows a committed checkpoint; every execution after it goes on from the newest intact one.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from lazypipe.stages.pretrain.checkpoint.directory import checkpoint_step
from tests.accidents import (
    committed,
    damage_newest,
    first_logged_step,
    train_on_a_full_disk,
    wait_for_checkpoint,
    wait_until,
)
from tests.pipeline.tiny import clean_environment, current_manifest, lazypipe, mlflow_runs, write_experiment

STEPS, EVERY = 200, 5
# 20 to 30 ms a step: slow enough to be hit at a random one.
OVERRIDES = [
    *(f"pretrain.steps={STEPS}", f"pretrain.checkpoint_every={EVERY}", "pretrain.tokens_per_step=1024"),
    *("model.hidden_size=64", "pretrain.micro_batch_size=8", "pretrain.keep_checkpoint_every=50"),
]
ONLY = ("--only", "pretrain/lazy")
ON_TWO_WORKERS = ("resources.pretrain.workers=2", "resources.pretrain.max_failures=2")


def start(config: Path, root: Path, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lazypipe", "run", str(config), *OVERRIDES, *ONLY, "--root", str(root), *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=clean_environment(), stdout=file, stderr=file, start_new_session=True)


def scratch_of(root: Path) -> Path:
    return next(iter(root.glob("store/pretrain/*/scratch")), root / "none yet")


def weights(root: Path) -> bytes:
    return next(root.glob("store/pretrain/*/g*/checkpoint/model.safetensors")).read_bytes()


def assert_each_step_logged_once(root: Path) -> None:
    from mlflow import MlflowClient

    (run,) = [r for r in mlflow_runs(root) if r.info.run_name == "pretrain/lazy"]
    history = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}").get_metric_history(run.info.run_id, "loss")
    assert sorted(point.step for point in history) == [*range(1, STEPS + 1)]


def kill_driver(process: subprocess.Popen[bytes]) -> None:
    """kill -9, and wait until nothing that trains is left: Ray's agents take their time, its workers do not."""
    family = [p for p in psutil.Process(process.pid).children(recursive=True) if is_worker(p)]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def newly_saved(scratch: Path, before: list[Path]) -> list[int]:
    return [checkpoint_step(p) for p in committed(scratch) if p not in before]


def is_worker(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith("ray::") and "Agent" not in process.cmdline()[0]
    except (psutil.Error, IndexError):
        return False


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_run_through_every_accident(tmp_path: Path, chaos_seed: int) -> None:
    """In one process: killed, stopped by SIGTERM, its newest checkpoint damaged in three ways, its disk full."""
    rng = random.Random(chaos_seed)
    config = write_experiment(tmp_path)
    calm, root, log = tmp_path / "calm", tmp_path / "output", tmp_path / "log.txt"
    result = lazypipe("run", config, *OVERRIDES, *ONLY, "--root", calm, "--local")
    assert result.returncode == 0, result.stdout + result.stderr

    accidents = ["kill", "SIGTERM", "flip", "truncate", "manifest", "disk full"]
    rng.shuffle(accidents)
    before = 0
    for number, accident in enumerate([*accidents, "none"], start=1):
        known = {*root.glob("store/pretrain/*/g*/metrics.jsonl")}
        process = start(config, root, log, "--local")

        def running(process: subprocess.Popen[bytes] = process) -> bool:
            return process.poll() is None or bool(print(log.read_text()[-3000:]))

        def new(known: set[Path] = known) -> set[Path]:
            return {*root.glob("store/pretrain/*/g*/metrics.jsonl")} - known

        def began(new: Callable[[], set[Path]] = new) -> int | None:
            return next(filter(None, map(first_logged_step, new())), None)

        wait_until(began, running, "a step")
        assert began() == before + 1, "went on from the newest intact checkpoint"
        if accident == "none":
            assert process.wait(200) == 0, log.read_text()
            break
        scratch = scratch_of(root)
        # Checkpoints of two more steps, so that there is one to fall back on, and at most 25 steps a piece.
        wait_for_checkpoint(scratch, before + EVERY * rng.randint(2, 3), running)
        time.sleep(rng.uniform(0, 0.1))
        if accident == "SIGTERM":
            process.terminate()
            assert process.wait(60) == 143, log.read_text()
        else:
            if accident == "disk full":
                (metrics,) = new()
                train_on_a_full_disk(process.pid, scratch, metrics, EVERY, running)
            process.kill()
            process.wait()
        said = damage_newest(scratch, accident, rng) if accident in ("flip", "truncate", "manifest") else ""
        before = checkpoint_step(committed(scratch)[-1])
        print(f"seed {chaos_seed}, execution {number}: {accident} {said} -> to go on from step {before}", flush=True)
        assert before > 0

    manifest = current_manifest(root, "pretrain", "lazy")
    assert (manifest["resumed_from"], manifest["steps_executed"]) == (before, STEPS - before)
    assert weights(root) == weights(calm)
    assert_each_step_logged_once(root)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_workers_through_the_loss_of_one_and_of_the_driver(tmp_path: Path, chaos_seed: int) -> None:
    """TorchTrainer restarts the group when a worker is killed; the driver's death ends it, and the next run goes on."""
    rng = random.Random(chaos_seed)
    config = write_experiment(tmp_path)
    calm, root, log = tmp_path / "calm", tmp_path / "output", tmp_path / "log.txt"
    assert start(config, calm, log, *ON_TWO_WORKERS).wait(280) == 0, log.read_text()

    process = start(config, root, log, *ON_TWO_WORKERS)

    def running() -> bool:
        return process.poll() is None

    before = 0
    wait_until(lambda: scratch_of(root).exists(), running, "training")
    for accident in ("worker", "driver"):
        wait_for_checkpoint(scratch_of(root), before + EVERY * rng.randint(2, 8), running)
        time.sleep(rng.uniform(0, 0.1))
        if accident == "worker":
            workers = [
                p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "ray::RayTrainWorker"
            ]
            victim = rng.choice(sorted(workers, key=lambda p: p.pid))
            assert len(workers) == 2
            victim.kill()
            psutil.wait_procs(workers, timeout=60)  # Ray Train ends the others of the group
        else:
            kill_driver(process)
        left = committed(scratch_of(root))
        before = checkpoint_step(left[-1])
        print(f"seed {chaos_seed}: {accident} killed -> to go on from step {before}", flush=True)
        if accident == "worker":
            saved = partial(newly_saved, scratch_of(root), left)
            wait_until(saved, running, "a checkpoint of the restarted group")
            assert min(saved()) > before, "the group went on from the checkpoint"
    assert start(config, root, log, *ON_TWO_WORKERS).wait(280) == 0, log.read_text()
    manifest = current_manifest(root, "pretrain", "lazy")
    assert (manifest["resumed_from"], manifest["steps_executed"]) == (before, STEPS - before)
    assert manifest["facts"]["world_size"] == 2
    assert weights(root) == weights(calm)
    assert_each_step_logged_once(root)
