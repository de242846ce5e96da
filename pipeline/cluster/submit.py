"""A Ray cluster from the outside: submit an experiment through the Jobs API, follow it, return its exit code.

Everything that can be wrong with the experiment is found here, before the cluster is contacted. The driver then runs on
the cluster (`lazypipe run experiment.yaml --address auto`) and survives this process. The token that opens the cluster
is used for the HTTP requests only: the job's driver inherits the cluster's own from the environment Ray runs in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from lazypipe.pipeline.cluster.package import START_SCRIPT_FILE, write_job_package
from lazypipe.pipeline.experiment.document import EXPERIMENT_FILE
from lazypipe.pipeline.experiment.schema import Experiment, load_experiment, local_files
from lazypipe.pipeline.tracking.uri import PROBE_TIMEOUT_S
from lazypipe.stages.contract import UserError, first_line

AGENT_DEADLINE_S = 60.0  # after `ray start` the head's agent needs 5 to 20 s before it takes jobs
LOST_DEADLINE_S = 60.0
RETRY_S = 1.0
STOP_WAIT_S = (
    30  # `ray job stop` kills after 3 s by default; an orderly stop takes up to 15 s (pipeline/execution/scheduler.py)
)
CLUSTER_HOME = "~/lazypipe"
TOKEN_HINT = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token or RAY_AUTH_TOKEN_PATH to a file that holds it"
)


def submit_job(
    config: Path, overrides: Sequence[str], address: str, follow: bool, root_option: str | None, console: Console
) -> int:
    """Submit an experiment file. Returns 0 once it is accepted, or with `follow` the exit code of the job.

    Raises UserError for a bad experiment, address or token, before anything is uploaded.
    """
    experiment = load_experiment(config, overrides)
    url = dashboard_url(address)
    place = job_place(experiment, root_option, os.environ)
    _probe_dashboard(url)
    client = _connect(url)
    with tempfile.TemporaryDirectory(prefix="lazypipe-job-") as directory:
        write_job_package(experiment, Path(directory))
        job_id = _submit(client, url, experiment, place, directory, console)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(f"submitted {job_id} to {url}")
    say(f"root on the cluster: {place.root}")
    if files := local_files(experiment):
        say(f"not shipped, must exist on every node of the cluster: {', '.join(files)}")
    how = f"follow: ray job logs --address {url} --follow {job_id}\nstop:   ray job stop --address {url} {job_id}"
    if not follow:
        say(how)
        return 0
    try:
        return _follow(client, job_id)
    except KeyboardInterrupt:
        say(f"\nno longer following; the job goes on\n{how}")
        return 130


def dashboard_url(address: str) -> str:
    """The address of a Ray dashboard, without a trailing slash; anything else is refused."""
    address = address.strip().rstrip("/")
    if not address:
        raise UserError("--address is missing: the URL of the cluster's Ray dashboard, such as http://127.0.0.1:8265")
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UserError(
            f"--address {address!r}: expected the URL of the cluster's Ray dashboard, such as http://127.0.0.1:8265"
        )
    return address


# ---- where the job writes, and what it is told


@dataclass(frozen=True)
class JobPlace:
    """`root` to show; `options` for the driver's command line; `env_vars` for the job's runtime environment."""

    root: str
    options: tuple[str, ...]
    env_vars: dict[str, str]


def job_place(experiment: Experiment, root_option: str | None, environment: Mapping[str, str]) -> JobPlace:
    """Where the driver writes and tracks: LAZYPIPE_HOME > --root > storage.root, relative ones below ~/lazypipe.

    A job's working directory belongs to Ray and goes away with it, so no relative path may be taken from there. All
    paths are the cluster's. LAZYPIPE_HOME set on the cluster goes before --root and storage.root, as anywhere.
    """
    env_vars = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    uri = environment.get("MLFLOW_TRACKING_URI", "")
    if uri:
        _check_tracking_uri(uri)
        env_vars["MLFLOW_TRACKING_URI"] = uri
    home = environment.get("LAZYPIPE_HOME", "")
    if home:
        home = _cluster_path(home)
        env_vars["LAZYPIPE_HOME"] = home
        return JobPlace(home, (), env_vars)
    root = _cluster_path(root_option or experiment.storage.root)
    return JobPlace(f"{root} (or LAZYPIPE_HOME, where the cluster sets it)", ("--root", root), env_vars)


def _cluster_path(path: str) -> str:
    return path if path.startswith(("/", "~")) else f"{CLUSTER_HOME}/{path.removeprefix('./')}"


def _check_tracking_uri(uri: str) -> None:
    parts = urlsplit(uri)
    if parts.scheme in ("", "file") or (parts.scheme == "sqlite" and not uri.startswith("sqlite:////")):
        raise UserError(
            f"MLFLOW_TRACKING_URI {uri!r} would lie in the job's temporary directory; name a server (http://host:port) "
            "or an absolute path on the cluster (sqlite:////path/mlflow.db), or unset it for the cluster's own"
        )
    if parts.password is not None:
        raise UserError(
            "MLFLOW_TRACKING_URI holds a password, and a job's environment is shown in the dashboard; leave it out and "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster"
        )


# ---- contact


def _probe_dashboard(url: str) -> None:
    """Refuse an address where nothing answers, within seconds and without importing Ray, whose requests wait long."""
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=PROBE_TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise UserError(
                f"{url} is no Ray dashboard: HTTP {error.code} to /api/version; give its URL as --address"
            ) from error
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            raise UserError(f"Ray cluster at {url} asks for a token; {TOKEN_HINT}") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"Ray cluster at {url} is unreachable: {getattr(error, 'reason', error)}; start it (ray start --head), or "
            "correct --address (the dashboard's URL; from outside the cluster, tunnel its port)"
        ) from error


def _connect(url: str) -> Any:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # Ray would let them override --address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)  # uploads and closed websockets are no news
    try:
        return JobSubmissionClient(url)
    except AuthenticationError as error:
        raise UserError(f"Ray cluster at {url}: {first_line(error)}; {TOKEN_HINT}") from error
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{url} does not answer as a Ray dashboard: {first_line(error)}") from error


def _submit(client: Any, url: str, experiment: Experiment, place: JobPlace, directory: str, console: Console) -> str:
    job_id = f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    command = shlex.join(["sh", START_SCRIPT_FILE, EXPERIMENT_FILE, "--address", "auto", *place.options])
    deadline = time.monotonic() + AGENT_DEADLINE_S
    waited = False
    while True:
        try:
            client.submit_job(
                # exec: the driver itself is the job's process, which gets the signals and whose exit code counts
                entrypoint=f"exec {command}",
                runtime_env={"working_dir": directory, "env_vars": place.env_vars},
                submission_id=job_id,
                metadata={"job_name": experiment.name},
            )
            return job_id
        except RuntimeError as error:
            agent_missing = "No available agent" in str(error)
            if not agent_missing or time.monotonic() > deadline:
                cause = f"no agent after {AGENT_DEADLINE_S:.0f} s" if agent_missing else _last_line(error)
                raise UserError(f"Ray cluster at {url} does not take the job: {cause}; see its dashboard") from error
        if not waited:
            waited = True
            console.print(f"the cluster's agent is coming up; trying for {AGENT_DEADLINE_S:.0f} s", highlight=False)
        time.sleep(RETRY_S)


# ---- following


def _follow(client: Any, job_id: str) -> int:
    """Print the job's log as it grows; returns the job's exit code."""
    seen = 0

    async def stream() -> None:
        nonlocal seen
        skip = seen  # a new connection starts at the beginning of the log
        async for text in client.tail_job_logs(job_id):
            new, skip = text[skip:], max(0, skip - len(text))
            seen += len(new)
            sys.stdout.write(new)
            sys.stdout.flush()

    last_contact = time.monotonic()
    while True:
        try:
            asyncio.run(stream())
        except (OSError, RuntimeError) as error:
            problem: Exception | None = error
        else:
            problem = None
        try:
            info = client.get_job_info(job_id)
            last_contact = time.monotonic()
            if info.status.is_terminal():
                return _exit_code(info)
        except (OSError, RuntimeError) as error:
            problem = error
        if time.monotonic() - last_contact > LOST_DEADLINE_S:
            print(f"error: lost {job_id}: {first_line(problem)}; it may be going on", file=sys.stderr, flush=True)
            return 1
        time.sleep(RETRY_S)


def _exit_code(info: Any) -> int:
    """The driver's own exit code; 128 + n if signal n ended it, 143 if it was stopped, 1 if it never started."""
    status, code = str(info.status), info.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        print("the job was stopped", file=sys.stderr, flush=True)
        return 143
    if code is None:
        print(f"error: the job did not run: {info.message}", file=sys.stderr, flush=True)
        return 1
    return 128 - code if code < 0 else int(code)


# ---- joining


def check_join(address: str) -> None:
    """Refuse, within seconds, a `run --address` that cannot be joined (ray.init tries for more than a minute)."""
    expected = "expected auto, or the cluster's own address such as 127.0.0.1:6379"
    if address == "auto":
        return
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address}: that is a dashboard; {expected}. From outside the cluster: "
            f"lazypipe submit CONFIG --address {address}"
        )
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--address {address!r}: {expected}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"Ray cluster at {address} is unreachable: {error}; start it (ray start --head) or correct --address"
        ) from error


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
