"""Jobs on a real cluster: `ray start --head --block` with a token on loopback, and an MLflow server beside it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.pipeline.tiny import clean_environment, lazypipe, write_experiment

START_TIMEOUT_S = 90
SMALL = ("~variants.standard", "model.num_layers=1", "pretrain.steps=4", "pretrain.validate_every=4")


@dataclass(frozen=True)
class Cluster:
    dashboard: str
    tracking: str
    token: str
    folder: Path
    config: Path
    log: Path

    def submit(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        variables: dict[str, Any] = {**self.environment(), **environment}
        return lazypipe("submit", *arguments, "--address", self.dashboard, **variables)

    def environment(self) -> dict[str, str]:
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "MLFLOW_TRACKING_URI": self.tracking,
            # Both would send a careless client elsewhere: Ray lets them override the address it is given.
            "RAY_ADDRESS": "http://127.0.0.1:9",
            "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9",
        }

    def runs(self) -> list[Run]:
        client = MlflowClient(tracking_uri=self.tracking)
        ids = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
        return list(client.search_runs(ids)) if ids else []

    def jobs(self) -> Any:
        request = urllib.request.Request(
            f"{self.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return {job["submission_id"]: job for job in json.load(answer) if job["submission_id"]}

    def job_log(self, job_id: str) -> str:
        request = urllib.request.Request(
            f"{self.dashboard}/api/jobs/{job_id}/logs", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(json.load(answer)["logs"])


def free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@contextmanager
def process_tree(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own; at the end it and all it has started are gone."""
    with log.open("wb") as output:
        root = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield root
    finally:
        tree = psutil.Process(root.pid).children(recursive=True) if root.poll() is None else []
        root.terminate()
        try:
            root.wait(20)
        except subprocess.TimeoutExpired:
            root.kill()
            root.wait()
        _, alive = psutil.wait_procs(tree, timeout=5)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=5)


def wait_for(answer: Callable[[], object], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not answer():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    gcs, dashboard, agent, client, tracking = free_ports(5)
    token = secrets.token_hex(16)
    session = Path(tempfile.mkdtemp(prefix="lp-ray-"))  # short: Ray's socket paths may hold 107 characters
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus", "2"]
    ray += ["--node-ip-address", "127.0.0.1", "--port", str(gcs), "--ray-client-server-port", str(client)]
    ray += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    ray += ["--dashboard-agent-listen-port", str(agent), "--temp-dir", str(session), "--disable-usage-stats"]
    ray += ["--object-store-memory", "100000000"]
    # The interpreter is not to be found by luck: PATH has none of the virtual environment.
    path = ":".join(p for p in os.environ["PATH"].split(":") if Path(p) != Path(sys.executable).parent)
    ray_environment = clean_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, PATH=path)
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    server += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(tracking)]
    server += ["--workers", "1"]
    server_environment = clean_environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    config = write_experiment(folder, root=folder / "shared")
    here = Cluster(
        f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{tracking}", token, folder, config, folder / "ray.log"
    )
    try:
        with (
            process_tree(ray, ray_environment, here.log) as head,
            process_tree(server, server_environment, folder / "mlflow.log"),
        ):
            wait_for(lambda: answers(here.dashboard) or head.poll() is not None, "the dashboard")
            assert head.poll() is None, here.log.read_text()
            wait_for(lambda: answers(f"{here.tracking}/health"), "the MLflow server")
            yield here
            tree = psutil.Process(head.pid).children(recursive=True)
        assert not [process for process in tree if process.is_running()]
    finally:
        shutil.rmtree(session, ignore_errors=True)


def test_a_job_with_no_or_a_wrong_token_is_refused(cluster: Cluster) -> None:
    tokens: list[dict[str, Any]] = [
        {"RAY_AUTH_TOKEN": cluster.token},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"},
    ]
    for wrong in tokens:
        result = lazypipe("submit", cluster.config, "--address", cluster.dashboard, **wrong)
        assert result.returncode == 2, result
        assert "RAY_AUTH_MODE=token" in result.stderr and "RAY_AUTH_TOKEN_PATH" in result.stderr
        assert "Traceback" not in result.stderr and cluster.token not in result.stderr
    assert cluster.jobs() == {}


def test_a_job_runs_on_the_cluster_and_in_its_mlflow(cluster: Cluster) -> None:
    # Another folder, and the agent may still be coming up: this is the first job the cluster is asked to take.
    result = cluster.submit(cluster.config, *SMALL, "--follow")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"interpreter: {Path(sys.executable).parent}" in result.stdout
    assert "pretrain/lazy: done" in result.stdout and "report: done" in result.stdout
    runs = cluster.runs()
    assert {run.info.status for run in runs} == {"FINISHED"}
    names = {run.info.run_name for run in runs}
    assert names == {"tiny", "tokenize", "pretrain/lazy", "evaluate/lazy", "sparsity/lazy", "report"}
    assert (cluster.folder / "shared" / "store" / "report").is_dir()
    assert not (cluster.folder / "shared" / "mlflow.db").exists()
    (job,) = cluster.jobs().values()
    assert job["submission_id"].startswith("tiny-") and job["metadata"]["job_name"] == "tiny"
    assert cluster.token not in str(job) + result.stdout + result.stderr


def test_the_drivers_own_refusal_comes_back_as_exit_code_2(cluster: Cluster) -> None:
    nowhere = cluster.folder / "nowhere.txt"
    result = cluster.submit(cluster.config, f"tokenize.source.paths=[{nowhere}]", "--follow")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "nowhere.txt" in result.stdout and "Traceback" not in result.stdout


def test_ctrl_c_leaves_the_job_and_a_stopped_job_is_killed_in_mlflow(cluster: Cluster) -> None:
    """The tokens are cached by the first job; training for 100000 steps is what is interrupted."""
    arguments = [
        str(cluster.config),
        *SMALL,
        "pretrain.steps=100000",
        "pretrain.log_every=50",
        "--address",
        cluster.dashboard,
        "--follow",
    ]
    environment = clean_environment(**cluster.environment())
    follower = subprocess.Popen(
        [sys.executable, "-m", "lazypipe", "submit", *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert follower.stdout is not None
        wait_for(lambda: "pretrain/lazy: started" in follower.stdout.readline(), "training to start")
        follower.send_signal(signal.SIGINT)
        rest = follower.stdout.read()
        assert follower.wait(20) == 130
    finally:
        follower.kill()
        follower.wait()
    (job_id,) = [i for i, job in cluster.jobs().items() if job["status"] == "RUNNING"]
    assert f"ray job stop --address {cluster.dashboard} {job_id}" in rest and "the job goes on" in rest
    request = urllib.request.Request(
        f"{cluster.dashboard}/api/jobs/{job_id}/stop",
        method="POST",
        headers={"Authorization": f"Bearer {cluster.token}"},
    )
    urllib.request.urlopen(request, timeout=10).close()
    wait_for(lambda: cluster.jobs()[job_id]["status"] == "STOPPED", "the job to stop", 40)

    def unfinished() -> list[tuple[str, str]]:
        runs = [run.info for run in cluster.runs() if run.info.status != "FINISHED" and run.info.run_name != "tiny"]
        return [(run.run_name, run.status) for run in runs]

    # The job may be reported stopped a moment before its driver's last word has reached MLflow.
    try:
        wait_for(lambda: unfinished() == [("pretrain/lazy", "KILLED")], "the run to be marked killed", 40)
    except AssertionError:
        print(cluster.job_log(job_id))
        assert unfinished() == [("pretrain/lazy", "KILLED")]
