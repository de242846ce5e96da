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

from stages.contract import Refusal

PROBE_TIMEOUT_S = 3.0


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, else a database below the root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"


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
        raise Refusal(
            f"MLflow tracking URI {uri} is unreachable: {reason}; start the server, correct MLFLOW_TRACKING_URI, "
            "or unset it to log to a local database"
        )
    if parts.scheme in ("", "file"):
        raise Refusal(
            f"MLflow tracking URI {uri!r} is a file store, which MLflow no longer accepts; "
            "use sqlite:///path/to/mlflow.db or the address of an MLflow server"
        )
    if parts.scheme == "sqlite":
        folder = Path(uri.removeprefix("sqlite:///")).parent
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        if not os.access(existing, os.W_OK):
            raise Refusal(f"MLflow tracking URI {uri}: {existing} is not writable; choose another root or URI")


@contextmanager
def first_touch(uri: str, root: Path) -> Iterator[None]:
    """One process at a time: several that create a fresh sqlite schema at once break it for good."""
    if not uri.startswith("sqlite:"):
        yield
        return
    with (root / ".mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
