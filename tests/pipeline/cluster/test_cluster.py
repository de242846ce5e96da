"""What a submission is made of, and what is refused before any cluster is contacted; ray_cluster.yaml; the UI."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from mlflow import MlflowClient

from lazypipe.pipeline.cluster.package import PACKAGES, START_SCRIPT, write_job_package
from lazypipe.pipeline.cluster.submit import _exit_code, check_join, dashboard_url, job_place
from lazypipe.pipeline.experiment.document import read_document
from lazypipe.pipeline.experiment.schema import compose, load_experiment
from lazypipe.pipeline.planning.code_version import PROJECT, code_version, sources_digest
from lazypipe.pipeline.tracking.ui import check_port, served_uri
from lazypipe.stages.contract import UserError
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.yaml_text import parse_yaml
from tests.pipeline.tiny import FinishedRun, clean_environment, lazypipe, write_experiment

DOCUMENT: dict[str, Any] = {"name": "tiny", "variants": {"lazy": {"mixer": "lazy"}}}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ---- where the job writes


@pytest.mark.parametrize(
    ("home", "option", "storage", "root", "options"),
    [
        (None, None, None, "~/lazypipe/output", ("--root", "~/lazypipe/output")),
        (None, None, "./runs/a", "~/lazypipe/runs/a", ("--root", "~/lazypipe/runs/a")),
        (None, None, "/shared/x", "/shared/x", ("--root", "/shared/x")),
        (None, "~/y", "/shared/x", "~/y", ("--root", "~/y")),
        ("/home/z", "/y", "/shared/x", "/home/z", ()),
        ("z", None, None, "~/lazypipe/z", ()),
    ],
)
def test_a_job_never_writes_into_the_directory_ray_takes_away(
    home: str | None, option: str | None, storage: str | None, root: str, options: tuple[str, ...]
) -> None:
    experiment = compose(DOCUMENT | ({"storage": {"root": storage}} if storage else {}))
    place = job_place(experiment, option, {"LAZYPIPE_HOME": home} if home else {})
    assert place.root.split(" ")[0] == root
    assert place.options == options
    assert place.env_vars.get("LAZYPIPE_HOME") == (root if home else None)


def test_only_named_variables_travel() -> None:
    environment = {
        "RAY_AUTH_TOKEN": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "MLFLOW_TRACKING_URI": "http://a:5000",
    }
    place = job_place(compose(DOCUMENT), None, environment)
    assert place.env_vars == {"RAY_JOB_STOP_WAIT_TIME_S": "30", "MLFLOW_TRACKING_URI": "http://a:5000"}


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "mlruns", "file:///a/mlruns", "http://user:secret@host:5000"])
def test_tracking_that_cannot_travel_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI") as refusal:
        job_place(compose(DOCUMENT), None, {"MLFLOW_TRACKING_URI": uri})
    assert "secret" not in str(refusal.value)


# ---- what travels


def test_the_package_holds_the_code_and_one_resolved_document(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\npretrain: {steps: 7}\n", encoding="utf-8")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nname: child\nvariants: {lazy: {mixer: lazy}}\n", encoding="utf-8")
    experiment = load_experiment(child, ["pretrain.lr=0.5", "seed=3"])
    package = tmp_path / "package"
    package.mkdir()
    write_job_package(experiment, package)
    assert compose(read_document(package / "experiment.yaml")) == experiment
    training = experiment.config(PretrainConfig, "lazy")
    assert training.steps == 7 and training.lr == 0.5
    assert {p.name for p in package.iterdir()} == {"lazypipe", "experiment.yaml", "code_version.json", "job.sh"}
    assert sum(p.stat().st_size for p in package.rglob("*.*")) < 4 * 2**20
    # Every file of the packages travels: a forgotten template would fail on the cluster only.
    ours = {p for name in PACKAGES for p in (PROJECT / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    shipped = {p.relative_to(package / "lazypipe") for p in (package / "lazypipe").rglob("*") if p.is_file()}
    assert {p.relative_to(PROJECT) for p in ours} <= shipped


def test_the_shipped_code_knows_the_commit_it_came_from(tmp_path: Path) -> None:
    write_job_package(compose(DOCUMENT), tmp_path)
    program = (
        "from lazypipe.pipeline.planning.code_version import *; c = code_version(); "
        "print(c.commit, len(c.diff), c.sources, PROJECT)"
    )
    printed = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    commit, diff, sources, project = printed.stdout.split()
    here = code_version()
    assert (commit, int(diff), sources) == (str(here.commit), len(here.diff), sources_digest())
    assert Path(project) == tmp_path


@pytest.mark.parametrize("folder", ["venv", "a venv"])
def test_the_start_script_uses_the_interpreter_of_the_workers(tmp_path: Path, folder: str) -> None:
    """A raylet, its worker and the worker's shell are imitated by three processes; PATH has no python at all."""
    interpreter = tmp_path / folder / "python"
    interpreter.parent.mkdir()
    interpreter.write_text('#!/bin/sh\necho "ran $0: $@"\nexit 7\n', encoding="utf-8")
    interpreter.chmod(0o755)
    (tmp_path / "job.sh").write_text(START_SCRIPT, encoding="utf-8")
    worker = "import subprocess, sys; sys.exit(subprocess.call('exec sh job.sh experiment.yaml --root /x', shell=True))"
    raylet = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {worker!r}]))"
    command = subprocess.list2cmdline([str(interpreter), "setup_worker.py", "default_worker.py"])
    result = subprocess.run(
        [sys.executable, "-c", raylet, "--node_id=1", f"--python_worker_command={command}", "--head"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"ran {interpreter}: -m lazypipe run experiment.yaml --root /x" in result.stdout, result
    assert result.returncode == 7


# ---- addresses and exit codes


@pytest.mark.parametrize(
    "address", ["", "  ", "auto", "127.0.0.1:8265", "ray://h:10001", "http://", "http://h:x", "ftp://h"]
)
def test_submit_needs_the_url_of_a_dashboard(address: str) -> None:
    with pytest.raises(UserError, match="Ray dashboard, such as"):
        dashboard_url(address)


def test_a_dashboard_url_loses_its_slash() -> None:
    assert dashboard_url(" https://head.lab:8265/ ") == "https://head.lab:8265"


@pytest.mark.parametrize("address", ["", "head", "ray://h:10001", "http://h:8265", "h:0", "h:70000", ":6379", "h:x"])
def test_run_cannot_join_what_is_no_cluster_address(address: str) -> None:
    with pytest.raises(UserError, match="expected auto"):
        check_join(address)


def test_run_refuses_an_address_where_nothing_listens() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="unreachable"):
        check_join(f"127.0.0.1:{free_port()}")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 130, 130),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 143),
    ],
)
def test_the_exit_code_is_the_drivers(status: str, driver: int | None, code: int) -> None:
    assert _exit_code(SimpleNamespace(status=status, driver_exit_code=driver, message="")) == code


def test_mistakes_are_found_before_the_cluster_is_asked(tmp_path: Path) -> None:
    """Exit 2 with the right error although nothing listens at the address; then the address is the error."""
    config = write_experiment(tmp_path)
    address = f"http://127.0.0.1:{free_port()}"
    misspelt = lazypipe("submit", config, "pretrain.stepz=3", "--address", address)
    assert (misspelt.returncode, "did you mean 'steps'" in misspelt.stderr) == (2, True), misspelt.stderr
    began = time.monotonic()
    alone = lazypipe("submit", config, "--address", address)
    assert (alone.returncode, "unreachable" in alone.stderr) == (2, True), alone.stderr
    assert time.monotonic() - began < 10
    missing = lazypipe("submit", config)
    assert (missing.returncode, "--address is missing" in missing.stderr) == (2, True), missing.stderr


# ---- ray_cluster.yaml


def test_ray_cluster_yaml_satisfies_ray() -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = parse_yaml((PROJECT / "ray_cluster.yaml").read_text(encoding="utf-8"), "ray_cluster.yaml")
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(cluster, schema)
    prepared = prepare_config(cluster)
    validate_config(prepared)
    workers = prepared["available_node_types"][prepared["head_node_type"]]
    assert workers["min_workers"] == len(cluster["provider"]["worker_ips"]) > 0


def test_ray_cluster_yaml_has_tokens_tracking_and_shared_storage_on_every_start() -> None:
    cluster = parse_yaml((PROJECT / "ray_cluster.yaml").read_text(encoding="utf-8"), "ray_cluster.yaml")
    head, workers = cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]
    starts = [command for command in [*head, *workers] if "ray start" in command]
    assert len(starts) == 2
    assert all(
        "RAY_AUTH_MODE=token" in c and "LAZYPIPE_HOME=" in c and "~/lazypipe-venv/bin/ray start" in c for c in starts
    )
    assert "--head" in starts[0] and "MLFLOW_TRACKING_URI=http://127.0.0.1:5000" in starts[0]
    assert any("mlflow server" in c and "--host 127.0.0.1 --port 5000" in c for c in head)
    assert any("-c ~/lazypipe-src/constraints.txt" in command for command in cluster["setup_commands"])
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for command in [*cluster["setup_commands"], *head, *workers]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_starting_the_mlflow_server_of_ray_cluster_yaml_returns_at_once(tmp_path: Path) -> None:
    """As over ssh: the caller waits until nobody holds its pipes. No server answers, so that one must be started."""
    programs = tmp_path / "lazypipe-venv" / "bin"
    programs.mkdir(parents=True)
    (tmp_path / "lazypipe-mlflow").mkdir()
    for name, body in (("python", "exit 1"), ("mlflow", 'echo "$@" > ~/called; sleep 5')):
        (programs / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    cluster = parse_yaml((PROJECT / "ray_cluster.yaml").read_text(encoding="utf-8"), "ray_cluster.yaml")
    (command,) = [c for c in cluster["head_start_ray_commands"] if "mlflow server" in c]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-c", f"true && ({command})"], env=environment, capture_output=True, check=True, timeout=4)
    deadline = time.monotonic() + 10
    while not (tmp_path / "called").exists() or not (tmp_path / "called").read_text():
        assert time.monotonic() < deadline, (tmp_path / "lazypipe-mlflow" / "server.log").read_text()
        time.sleep(0.05)
    called = (tmp_path / "called").read_text()
    assert f"--backend-store-uri sqlite:///{tmp_path}/lazypipe-mlflow/mlflow.db" in called


# ---- the UI


def test_the_ui_refuses_what_it_cannot_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAZYPIPE_HOME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="no such database yet"):
        served_uri(str(tmp_path))
    (tmp_path / "mlflow.db").touch()
    assert served_uri(str(tmp_path)) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    with pytest.raises(UserError, match="open http://tracking:5000"):
        served_uri(str(tmp_path))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(UserError, match="in use"):
            check_port("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(UserError, match="expected 1 to 65535"):
        check_port("127.0.0.1", 0)


def test_the_ui_serves_the_database_and_ends_with_ctrl_c(finished_run: FinishedRun) -> None:
    port = free_port()
    command = [sys.executable, "-m", "lazypipe", "ui", "--root", str(finished_run.root), "--port", str(port)]
    ui = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert ui.stdout is not None
        assert "starting" in ui.stdout.readline()
        assert ui.stdout.readline().startswith(f"http://127.0.0.1:{port} ")
        names = {e.name for e in MlflowClient(tracking_uri=f"http://127.0.0.1:{port}").search_experiments()}
        assert "tiny" in names
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
            assert b"<title>MLflow</title>" in page.read()
        os.kill(ui.pid, signal.SIGINT)
        assert ui.wait(20) == 0
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    finally:
        ui.kill()
        ui.wait()
