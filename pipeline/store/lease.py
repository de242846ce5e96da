"""Leases: one execution of a recipe at a time, on one host or several, and none that outlives its process.

A lease is a file beside the recipe's generations. On its own host a holder is alive while a process with its pid and
start time exists; seen from another host, while its heartbeat is younger than HEARTBEAT_TIMEOUT_S. Taking one happens
under an flock, so that two runs cannot both find it free.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from lazypipe.stages.contract import write_atomically

HEARTBEAT_INTERVAL_S = 10.0
HEARTBEAT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    host: str
    pid: int
    started: float
    token: str
    command: str

    def describe(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command})"


def myself(command: str) -> Holder:
    process = psutil.Process()
    return Holder(socket.gethostname(), process.pid, process.create_time(), secrets.token_hex(8), command)


def acquire(directory: Path, me: Holder) -> Holder | None:
    """Take the lease of a recipe. Returns None when it is ours now, else the living holder."""
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        holder = read_holder(directory)
        if holder is not None and holder.token != me.token and _alive(holder, directory):
            return holder
        write_atomically(directory / "lease.json", json.dumps(asdict(me)))
    return None


def release(directory: Path, me: Holder) -> None:
    with _locked(directory):
        holder = read_holder(directory)
        if holder is not None and holder.token == me.token:
            (directory / "lease.json").unlink(missing_ok=True)


def held_by(directory: Path, token: str) -> bool:
    """Whether the lease still belongs to the holder with this token (asked before a commit)."""
    holder = read_holder(directory)
    return holder is not None and holder.token == token


def living_holder(directory: Path) -> Holder | None:
    holder = read_holder(directory)
    return holder if holder is not None and _alive(holder, directory) else None


def read_holder(directory: Path) -> Holder | None:
    """The holder named in lease.json; None when there is none or the file is damaged."""
    try:
        holder = Holder(**json.loads((directory / "lease.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    texts = (holder.host, holder.token, holder.command)
    usable = all(isinstance(text, str) for text in texts) and isinstance(holder.started, (int, float))
    return holder if usable and isinstance(holder.pid, int) and 0 < holder.pid < 2**31 else None


def is_alive(holder: Holder) -> bool | None:
    """Whether the holder's process exists; None when it is on another host."""
    if holder.host != socket.gethostname():
        return None
    try:
        process = psutil.Process(holder.pid)
        return abs(process.create_time() - holder.started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _alive(holder: Holder, directory: Path) -> bool:
    here = is_alive(holder)
    if here is not None:
        return here
    try:
        age = time.time() - (directory / "lease.json").stat().st_mtime
    except OSError:
        return False
    return age < HEARTBEAT_TIMEOUT_S


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory / ".lease.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Heartbeat:
    """Touches every held lease from a daemon thread, so that other hosts see a living holder."""

    def __init__(self) -> None:
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)

    def add(self, directory: Path) -> None:
        with self._lock:
            self._held.add(directory)
        if not self._thread.is_alive() and not self._stop.is_set():
            self._thread.start()

    def remove(self, directory: Path) -> None:
        with self._lock:
            self._held.discard(directory)

    def stop(self) -> None:
        self._stop.set()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_INTERVAL_S):
            with self._lock:
                held = list(self._held)
            for directory in held:
                try:
                    os.utime(directory / "lease.json")
                except OSError:
                    continue
