"""Which MLflow a run logs to, and whether it can. Imports no mlflow: a cached run and a refusal need none."""

from __future__ import annotations

import fcntl
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from lazypipe.stages.contract import UserError

PROBE_TIMEOUT_S = 3.0  # for a server, MLflow's or Ray's, to answer
SQLITE_HEADER = b"SQLite format 3\0"


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, else a database below the root."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):  # workers and later commands may stand in another directory
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def probe(uri: str) -> None:
    """Refuse a tracking URI that cannot work, within seconds and without importing mlflow."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_TIMEOUT_S):
                return
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return  # a server that wants credentials is there; mlflow reads them from its own environment
            reason = f"it answered HTTP {error.code} to /health"
        except (OSError, ValueError) as error:
            reason = str(getattr(error, "reason", error))
        raise UserError(
            f"MLflow tracking URI {uri} is unreachable: {reason}; start the server, correct MLFLOW_TRACKING_URI, "
            "or unset it to log to a local database"
        )
    if parts.scheme in ("", "file") and uri != "databricks":
        raise UserError(
            f"MLflow tracking URI {uri!r} is a file store, which MLflow no longer accepts; "
            "use sqlite:///path/to/mlflow.db or the address of an MLflow server"
        )
    if parts.scheme == "sqlite":
        database = Path(uri.removeprefix("sqlite:///"))
        if database.is_file() and database.stat().st_size and not _starts_with(database, SQLITE_HEADER):
            raise UserError(f"MLflow tracking URI {uri}: {database} is not a SQLite database; move it away")
        folder = database.parent
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        if not os.access(existing, os.W_OK):
            raise UserError(f"MLflow tracking URI {uri}: {existing} is not writable; choose another root or URI")


def _starts_with(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


@contextmanager
def first_touch(uri: str, root: Path) -> Iterator[None]:
    """One process at a time: several that create a fresh sqlite schema at once break it for good."""
    if not uri.startswith("sqlite:"):
        yield
        return
    with (root / ".mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
