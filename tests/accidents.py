"""What happens to a training run in the chaos tests, and how they see that it went on from a checkpoint."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from lazypipe.stages.pretrain.checkpoint.directory import CHECKPOINT_MANIFEST, checkpoint_problem, checkpoint_step

ROOM_LEFT = 2**16  # bytes; below the tensors of the models here, above their metrics.jsonl and a log


def committed(scratch: Path) -> list[Path]:
    """The checkpoints that are intact, oldest first."""
    return [p for p in sorted(scratch.glob("checkpoints/step-*")) if checkpoint_problem(p) is None]


def wait_until(condition: Callable[[], object], running: Callable[[], bool], what: str, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert running(), f"the run ended before {what}"
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(0.002)


def wait_for_checkpoint(scratch: Path, step: int, running: Callable[[], bool]) -> None:
    """Until one of `step` or later is committed: it has its name only after its manifest is on disk."""

    def there() -> bool:
        return any(checkpoint_step(p) >= step for p in scratch.glob("checkpoints/step-*"))

    wait_until(there, running, f"a checkpoint of step {step}")


def flip_bytes(checkpoint: Path, rng: random.Random) -> str:
    file = rng.choice([p for p in sorted(checkpoint.iterdir()) if p.name != CHECKPOINT_MANIFEST])
    content = bytearray(file.read_bytes())
    for _ in range(3):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"bits flipped in {file.name}"


def truncate_file(checkpoint: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(checkpoint.iterdir()))
    os.truncate(file, rng.randrange(file.stat().st_size))
    return f"{file.name} truncated"


def lose_manifest(checkpoint: Path, rng: random.Random) -> str:  # noqa: ARG001
    (checkpoint / CHECKPOINT_MANIFEST).unlink()
    return "manifest lost"


DAMAGES = {"flip": flip_bytes, "truncate": truncate_file, "manifest": lose_manifest}


def damage_newest(scratch: Path, kind: str, rng: random.Random) -> str:
    """Damage the newest checkpoint of a run that has ended; another must stand behind it."""
    intact = committed(scratch)
    assert len(intact) >= 2, "nothing to fall back on"
    said = DAMAGES[kind](intact[-1], rng)
    assert committed(scratch) == intact[:-1]
    return f"{intact[-1].name}: {said}"


@contextmanager
def disk_full(pid: int) -> Iterator[None]:
    """No file of the process grows beyond 64 KiB: the operating system refuses its writes (EFBIG), as a full disk does.

    From outside, so that the program under test knows nothing of it.
    """
    process = psutil.Process(pid)
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (ROOM_LEFT, before[1]))
    try:
        yield
    finally:
        if process.is_running():
            process.rlimit(psutil.RLIMIT_FSIZE, before)


def train_on_a_full_disk(pid: int, scratch: Path, metrics: Path, every: int, running: Callable[[], bool]) -> None:
    """Let a run that saves each `every` steps fail to; make room, and wait until it has saved again."""
    with disk_full(pid):
        full_since = last_logged_step(metrics)
        wait_until(lambda: last_logged_step(metrics) >= full_since + 2 * every, running, "training going on")
        assert checkpoint_step(committed(scratch)[-1]) <= full_since, "the disk took a checkpoint"
    wait_for_checkpoint(scratch, full_since + 1, running)


def first_logged_step(metrics_file: Path) -> int | None:
    """Of an execution that logs every step: one more than the step it went on from."""
    try:
        line, newline, _ = metrics_file.read_text(encoding="utf-8").partition("\n")
    except OSError:
        return None
    return int(json.loads(line)["step"]) if newline else None


def last_logged_step(metrics_file: Path) -> int:
    return int(json.loads(metrics_file.read_bytes().split(b"\n")[-2])["step"])
