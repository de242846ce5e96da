"""Leases: one holder at a time, and none that outlives its process. Real processes race and die here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from lazypipe.pipeline.store import lease
from lazypipe.pipeline.store.lease import (
    Heartbeat,
    Holder,
    acquire,
    held_by,
    is_alive,
    living_holder,
    myself,
    read_holder,
    release,
)

ROUNDS = 40
# Says ready, waits for the starting line, tries to take every lease at once, says what it got, and stays alive.
RACER = f"""
import sys, time
from pathlib import Path
from lazypipe.pipeline.store.lease import acquire, myself
me, root = myself("racer"), Path(sys.argv[1])
print("ready", flush=True)
start = float(sys.stdin.readline())
while time.time() < start:
    pass
won = [round_ for round_ in range({ROUNDS}) if acquire(root / str(round_), me) is None]
print(*won, flush=True)
sys.stdin.readline()
"""


def racer(root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RACER, str(root)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_from(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def start_at(process: subprocess.Popen[str], moment: float) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{moment}\n")
    process.stdin.flush()


@pytest.fixture
def racers(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    processes = [racer(tmp_path) for _ in range(3)]
    try:
        assert [line_from(process) for process in processes] == ["ready"] * len(processes)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def write_lease(directory: Path, holder: Holder, age_s: float = 0.0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lease.json"
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def test_of_racing_processes_exactly_one_wins_and_its_death_frees_the_lease(
    tmp_path: Path, racers: list[subprocess.Popen[str]]
) -> None:
    start = time.time() + 0.2
    for process in racers:
        start_at(process, start)
    won = [[int(number) for number in line_from(process).split()] for process in racers]
    assert sorted(number for numbers in won for number in numbers) == list(range(ROUNDS))

    me = myself("latecomer")
    for process, numbers in zip(racers, won, strict=True):
        for number in numbers:
            holder = acquire(tmp_path / str(number), me)
            assert holder is not None and holder.pid == process.pid and str(holder.pid) in holder.describe()
            assert living_holder(tmp_path / str(number)) == holder

    for process in racers:
        process.kill()
        process.wait()
    assert all(living_holder(tmp_path / str(number)) is None for number in range(ROUNDS))
    assert all(acquire(tmp_path / str(number), me) is None for number in range(ROUNDS))
    assert all(held_by(tmp_path / str(number), me.token) for number in range(ROUNDS))


def test_a_killed_process_nobody_waited_for_holds_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        here = myself("x")
        started = psutil.Process(process.pid).create_time()
        holder = replace(here, pid=process.pid, started=started, token="other")
        assert is_alive(holder)
        process.kill()
        deadline = time.monotonic() + 10
        while is_alive(holder) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive(holder), "a zombie is dead"
        write_lease(tmp_path, holder)
        assert acquire(tmp_path, here) is None
    finally:
        process.kill()
        process.communicate()


def test_another_process_with_the_holders_pid_is_not_the_holder(tmp_path: Path) -> None:
    me = myself("x")
    write_lease(tmp_path, replace(me, token="other", started=me.started - 100))
    assert living_holder(tmp_path) is None and acquire(tmp_path, me) is None
    write_lease(tmp_path, replace(me, token="other"))
    assert acquire(tmp_path, me) is not None


@pytest.mark.parametrize(("age_s", "alive"), [(0.0, True), (20.0, True), (31.0, False), (-60.0, True)])
def test_a_holder_on_another_host_lives_while_its_heartbeat_is_young(tmp_path: Path, age_s: float, alive: bool) -> None:
    me = myself("x")
    other = Holder("another host", 1, 0.0, "other", "lazypipe run")
    write_lease(tmp_path, other, age_s)
    assert is_alive(other) is None
    assert living_holder(tmp_path) == (other if alive else None)
    assert acquire(tmp_path, me) == (other if alive else None)
    assert held_by(tmp_path, me.token) is not alive


def test_only_the_owner_releases(tmp_path: Path) -> None:
    mine, other = myself("mine"), myself("other")
    assert acquire(tmp_path, mine) is None
    release(tmp_path, other)
    assert held_by(tmp_path, mine.token) and not held_by(tmp_path, other.token)
    release(tmp_path, mine)
    assert read_holder(tmp_path) is None
    release(tmp_path, mine)
    assert acquire(tmp_path, other) is None


def test_a_lease_taken_twice_by_its_holder_stays_its_own(tmp_path: Path) -> None:
    me = myself("x")
    assert acquire(tmp_path, me) is None and acquire(tmp_path, me) is None
    assert read_holder(tmp_path) == me


VALID: dict[str, Any] = {"host": "h", "pid": 1, "started": 0.0, "token": "t", "command": "c"}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "{}", "3", "\x00", '"text"'),
        *(json.dumps(VALID | {"pid": pid}) for pid in (-1, 0, 10**30, "1", None, 1.5)),
        *(json.dumps(VALID | wrong) for wrong in ({"started": "x"}, {"token": 3}, {"host": None}, {"extra": 1})),
    ],
)
def test_a_damaged_lease_file_holds_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "lease.json").write_text(text.replace('"h"', json.dumps(socket.gethostname())))
    me = myself("x")
    assert read_holder(tmp_path) is None and living_holder(tmp_path) is None and not held_by(tmp_path, "t")
    release(tmp_path, me)
    assert acquire(tmp_path, me) is None and read_holder(tmp_path) == me


def test_a_heartbeat_touches_held_leases_and_no_released_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_INTERVAL_S", 0.01)
    me, heartbeat = myself("x"), Heartbeat()
    for name in ("held", "released", "deleted"):
        acquire(tmp_path / name, me)
        os.utime(tmp_path / name / "lease.json", (1, 1))
    (tmp_path / "deleted" / "lease.json").unlink()
    heartbeat.add(tmp_path / "released")
    heartbeat.remove(tmp_path / "released")
    os.utime(tmp_path / "released" / "lease.json", (1, 1))
    heartbeat.add(tmp_path / "deleted")
    heartbeat.add(tmp_path / "held")
    try:
        deadline = time.monotonic() + 10
        while (tmp_path / "held" / "lease.json").stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "held" / "lease.json").stat().st_mtime > 1
        assert (tmp_path / "released" / "lease.json").stat().st_mtime == 1
        assert not (tmp_path / "deleted" / "lease.json").exists()
    finally:
        heartbeat.stop()
