"""`lazypipe ui`: the MLflow UI on the database below the root, for as long as this process lives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from lazypipe.pipeline.experiment.schema import resolve_root
from lazypipe.pipeline.tracking.uri import tracking_uri
from lazypipe.stages.contract import UserError
from lazypipe.stages.signals import handled_signals

START_TIMEOUT_S = 120.0  # 12 s on two idle cores
STOP_TIMEOUT_S = 10.0


def serve_ui(root_option: str | None, host: str, port: int) -> int:
    """Serve until Ctrl-C (0) or SIGTERM (143); 1 if the server ends by itself.

    Raises UserError if there is no database, if MLFLOW_TRACKING_URI names a server, or if the port cannot be had.
    """
    uri = served_uri(root_option)
    check_port(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", host]
    command += ["--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    # Job execution starts five more processes (2.3 GB instead of 0.5 GB) for features nobody uses here.
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with handled_signals(_terminated, (signal.SIGTERM,)):
        # A session of its own: Ctrl-C reaches only this process, which then ends the whole group in order.
        server = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        try:
            print(f"starting the MLflow UI on {uri} ...", flush=True)
            if _wait_until_healthy(server, port, host):
                print(f"{address}   (Ctrl-C ends it)", flush=True)
            code = server.wait()
            print(f"error: the MLflow server ended by itself with exit code {code}", file=sys.stderr, flush=True)
            return 1
        except KeyboardInterrupt:
            return 0
        finally:
            _end(server)


def served_uri(root_option: str | None) -> str:
    """The database to serve; a server, or a database that does not exist yet, is refused."""
    root = resolve_root(None, root_option)
    uri = tracking_uri(root)
    if urlsplit(uri).scheme in ("http", "https"):
        raise UserError(f"MLFLOW_TRACKING_URI names a server, which has a UI of its own: open {uri} (or unset it)")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UserError(f"{uri}: no such database yet; run an experiment first, or name its root with --root")
    return uri


def check_port(host: str, port: int) -> None:
    """Refuse a port that cannot be listened on; MLflow would say so only after ten seconds."""
    if not 0 < port < 65536:
        raise UserError(f"--port {port}: expected 1 to 65535")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be listened on: {error.strerror or error}; name another --port"
        ) from error


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, host: str) -> bool:
    """False when the server ended or has not answered in time."""
    probe_host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    deadline = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{probe_host}:{port}/health", timeout=2):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.2)
    return False


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server's whole process group: MLflow's command, uvicorn and its workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(STOP_TIMEOUT_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _terminated(number: int) -> None:
    sys.exit(128 + number)
