"""The walker beside other runs, and when it is told to stop."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from lazypipe.pipeline.execution import scheduler as walk_module
from lazypipe.pipeline.execution.execute import LeaseLostError, StageTask
from lazypipe.pipeline.store.lease import Holder, myself
from lazypipe.pipeline.store.store import Entry, Store
from lazypipe.stages.contract import Interrupted, UserError
from tests.pipeline.execution.fake_scheduler import FakeBackend, commit_task, fail, small_nodes, walked
from tests.pipeline.store.filled_store import commit, filled

LAZY = ["pretrain/lazy", "evaluate/lazy", "sparsity/lazy"]
STANDARD = ["pretrain/standard", "evaluate/standard", "sparsity/standard"]

# ---- leases


@pytest.fixture
def neighbour() -> Iterator[tuple[subprocess.Popen[bytes], Holder]]:
    """Another living process, as the holder of a lease."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = psutil.Process(process.pid).create_time()
        yield process, replace(myself("lazypipe run other.yaml"), pid=process.pid, started=started)
    finally:
        process.kill()
        process.communicate()


def lease_to(entry: Entry, holder: Holder) -> None:
    entry.path.mkdir(parents=True, exist_ok=True)
    (entry.path / "lease.json").write_text(json.dumps(asdict(holder)))


def after_polls(count: int, action: Callable[[], object]) -> Callable[[], None]:
    """A stop_signal-like hook that runs `action` once, when it was asked `count` times."""
    asked = iter(range(10**6))

    def hook() -> None:
        if next(asked) == count:
            action()

    return hook


def test_a_stage_another_run_is_at_is_waited_for_and_its_result_used(
    tmp_path: Path, neighbour: tuple[subprocess.Popen[bytes], Holder]
) -> None:
    nodes = small_nodes()
    store = filled(tmp_path, nodes, ["tokenize"])
    entry = store.entry("pretrain", nodes["pretrain/lazy"].fingerprint)
    lease_to(entry, neighbour[1])

    def finish() -> None:
        commit(store, nodes, "pretrain/lazy", metrics={"made": 2})
        (entry.path / "lease.json").unlink()

    done = walked(store, FakeBackend(), stop_signal=after_polls(60, finish))
    assert "pretrain/lazy" not in done.backend.started and done.states()["pretrain/lazy"] == "cached"
    assert {done.states()[i] for i in STANDARD} == {"done"}, "the others go on meanwhile"
    generation = done.outcomes["pretrain/lazy"].generation
    assert generation is not None and generation.manifest["metrics"] == {"made": 2}
    assert done.said.count(f"pretrain/lazy: waiting for process {neighbour[0].pid} on ") == 1
    assert "lazypipe run other.yaml" in done.said
    assert ("link", "pretrain/lazy", generation.id) in done.tracker.calls


def test_when_the_other_run_dies_the_stage_is_taken_over(
    tmp_path: Path, neighbour: tuple[subprocess.Popen[bytes], Holder]
) -> None:
    nodes = small_nodes()
    store = filled(tmp_path, nodes, ["tokenize"])
    lease_to(store.entry("pretrain", nodes["pretrain/lazy"].fingerprint), neighbour[1])
    done = walked(store, FakeBackend(), stop_signal=after_polls(30, neighbour[0].kill))
    assert done.states()["pretrain/lazy"] == "done" and "pretrain/lazy: waiting for process" in done.said


def test_without_waiting_a_held_stage_is_refused(
    tmp_path: Path, neighbour: tuple[subprocess.Popen[bytes], Holder]
) -> None:
    nodes = small_nodes()
    store = Store(tmp_path)
    lease_to(store.entry("tokenize", nodes["tokenize"].fingerprint), neighbour[1])
    done = walked(store, FakeBackend(), wait=False)
    assert isinstance(done.outcomes["tokenize"].error, UserError) and done.states()["pretrain/lazy"] == "blocked"
    assert re.match(r"process .* is executing it now; leave --no-wait out", str(done.outcomes["tokenize"].error))


def test_a_lost_lease_is_no_failure_and_the_winners_result_is_used(tmp_path: Path) -> None:
    nodes = small_nodes()
    store = Store(tmp_path)

    def lose(_backend: FakeBackend, task: StageTask, _paths: Sequence[str]) -> BaseException:
        commit(store, nodes, "pretrain/lazy", metrics={"winner": 1})
        return LeaseLostError(f"{task.node_id}: another run took over")

    done = walked(store, FakeBackend({"pretrain/lazy": lose}))
    assert done.backend.started.count("pretrain/lazy") == 1 and done.states()["pretrain/lazy"] == "cached"
    generation = done.outcomes["pretrain/lazy"].generation
    assert generation is not None and generation.manifest["metrics"] == {"winner": 1}
    assert done.states()["report"] == "done" and "another run took over" in done.said
    assert ("fail", "run of pretrain/lazy", "KILLED", "pretrain/lazy: another run took over") in done.tracker.calls


def test_a_lost_lease_without_a_result_runs_again(tmp_path: Path) -> None:
    attempts = []

    def lose_once(_backend: FakeBackend, task: StageTask, paths: Sequence[str]) -> BaseException | str:
        attempts.append(task.generation)
        return LeaseLostError("taken over") if len(attempts) == 1 else commit_task(task, paths)

    done = walked(Store(tmp_path), FakeBackend({"pretrain/lazy": lose_once}))
    assert len(attempts) == 2 and set(done.states().values()) == {"done"}


# ---- interruptions


def train_until_stopped(_backend: FakeBackend, task: StageTask, _paths: Sequence[str]) -> BaseException | None:
    return Interrupted("saved at step 7") if (task.entry / "scratch" / "stop").exists() else None


def run_for_ever(_backend: FakeBackend, _task: StageTask, _paths: Sequence[str]) -> None:
    return None


def signal_when(backend: FakeBackend, node_id: str) -> Callable[[], int | None]:
    return lambda: signal.SIGINT if node_id in backend.started else None


def test_a_signal_lets_training_save_and_starts_nothing_more(tmp_path: Path) -> None:
    backend = FakeBackend({"pretrain/lazy": train_until_stopped})
    done = walked(Store(tmp_path), backend, stop_signal=signal_when(backend, "pretrain/lazy"))
    assert backend.started == ["tokenize", "pretrain/lazy"] and backend.cancelled == []
    states = done.states()
    assert states["tokenize"] == "done" and states["pretrain/lazy"] == "killed" and states["evaluate/lazy"] == "waiting"
    assert re.search(r"pretrain/lazy: killed in \d+s: resumes with the next run", done.said)
    assert ("fail", "run of pretrain/lazy", "KILLED", "") in done.tracker.calls
    again = walked(done.store, FakeBackend())
    assert "tokenize" not in again.backend.started and set(again.states().values()) == {"done", "cached"}


def test_a_signal_cancels_what_cannot_save_and_ends_what_does_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_module, "GRACE_S", 0.05)
    backend = FakeBackend({"evaluate/lazy": run_for_ever, "sparsity/lazy": run_for_ever})
    done = walked(Store(tmp_path), backend, stop_signal=signal_when(backend, "sparsity/lazy"))
    assert done.states()["evaluate/lazy"] == done.states()["sparsity/lazy"] == "killed"
    for node_id in ("evaluate/lazy", "sparsity/lazy"):
        assert [force for name, force in backend.cancelled if name == node_id] == [False, True]
    assert not list(tmp_path.glob("store/evaluate/*/g*")), "no half-written generation stays"


def test_what_ends_well_during_the_grace_is_kept(tmp_path: Path) -> None:
    def finish_when_cancelled(backend: FakeBackend, task: StageTask, paths: Sequence[str]) -> str | None:
        return commit_task(task, paths) if backend.cancelled else None

    backend = FakeBackend({"evaluate/lazy": finish_when_cancelled})
    done = walked(Store(tmp_path), backend, stop_signal=signal_when(backend, "evaluate/lazy"))
    assert done.states()["evaluate/lazy"] == "done"


def test_a_keyboard_interrupt_kills_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "GRACE_S", 0.05)
    interrupts = iter([KeyboardInterrupt()])

    def interrupt(_backend: FakeBackend, _task: StageTask, _paths: Sequence[str]) -> None:
        for error in interrupts:
            raise error

    done = walked(Store(tmp_path), FakeBackend({"pretrain/lazy": interrupt}))
    assert done.states()["pretrain/lazy"] == "killed" and done.states()["evaluate/lazy"] == "waiting"


def test_a_training_told_to_stop_by_somebody_else_blocks_its_children_and_the_walk_ends(tmp_path: Path) -> None:
    done = walked(Store(tmp_path), FakeBackend({"pretrain/lazy": fail(Interrupted("saved at step 7"))}))
    states = done.states()
    assert states["pretrain/lazy"] == "killed" and states["evaluate/lazy"] == states["report"] == "blocked"
    assert {states[i] for i in STANDARD} == {"done"}


def test_a_walk_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}
    walked(Store(tmp_path), FakeBackend())
    after = {t.name for t in threading.enumerate() if t.name != "lease-heartbeat"}  # a daemon; it ends at its next beat
    assert after <= before


def test_a_handler_installed_below_python_does_not_keep_the_signal() -> None:
    """What ray.init does, made certain: sigaction goes past Python, whose own handler still counts itself installed."""
    code = """
import ctypes, os, signal
from lazypipe.pipeline.execution.backends import signal_handlers_kept
signal.signal(signal.SIGTERM, lambda number, frame: print("asked to stop", flush=True))
with signal_handlers_kept():
    ctypes.CDLL(None).signal(signal.SIGTERM, 0)
os.kill(os.getpid(), signal.SIGTERM)
print("goes on")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "asked to stop\ngoes on\n"), result
