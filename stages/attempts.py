"""The attempts that a training run took: when each began, at which step, on how many workers, and what ended the last.

scratch_dir/attempts.jsonl   one line per attempt, appended when it has found the checkpoint it goes on from
scratch_dir/last_end         why the attempt before ended, if anybody lived to say so
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from lazypipe.stages.contract import Context, first_line, write_atomically
from lazypipe.stages.facts import Attempt

ATTEMPTS, LAST_END = "attempts.jsonl", "last_end"


def begin_attempt(context: Context, from_step: int) -> list[Attempt]:
    """Append this attempt; returns all so far. Only rank 0 writes; the others get []."""
    if context.rank != 0:
        return []
    attempts = read_attempts(context.scratch_dir)
    end = context.scratch_dir / LAST_END
    cause = end.read_text(encoding="utf-8") if end.exists() else "ended without a word: killed, or its machine lost"
    if attempts and not end.exists() and attempts[-1].workers != context.world_size:
        cause += f", or resized from {attempts[-1].workers} to {context.world_size} workers"
    attempts.append(
        Attempt(
            attempt=len(attempts) + 1,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            from_step=from_step,
            workers=context.world_size,
            cause=cause if attempts else None,
        )
    )
    with suppress(OSError):  # a full disk costs the note, not the training
        # Rewritten as a whole: the line of an attempt that was killed while writing it would spoil the next one's.
        write_atomically(context.scratch_dir / ATTEMPTS, "".join(json.dumps(asdict(one)) + "\n" for one in attempts))
        end.unlink(missing_ok=True)
    return attempts


def end_attempt(scratch_dir: Path, cause: BaseException | str) -> None:
    """Say why the current attempt ends. Who can tell more may say it again: the last word counts."""
    text = cause if isinstance(cause, str) else f"{type(cause).__name__}: {first_line(cause)}"
    with suppress(OSError):  # on a full disk the reason itself is the one to hear of
        write_atomically(scratch_dir / LAST_END, text[:500])


@contextmanager
def ends_noted(scratch_dir: Path) -> Iterator[None]:
    """Inside, an exception is the end of the attempt that began there; of a start that came to none it is not."""
    before = len(read_attempts(scratch_dir))
    try:
        yield
    except BaseException as error:
        if len(read_attempts(scratch_dir)) > before:
            end_attempt(scratch_dir, error)
        raise


def read_attempts(scratch_dir: Path) -> list[Attempt]:
    """The attempts so far, [] before the first."""
    try:
        text = (scratch_dir / ATTEMPTS).read_text(encoding="utf-8")
    except FileNotFoundError:  # or gone this moment: the scratch is removed when a stage has committed
        return []
    return [Attempt.from_json(json.loads(line), ATTEMPTS) for line in text.splitlines()]
