"""Every attempt of a run is written down once, with the end of the one before."""

from pathlib import Path

import pytest

from lazypipe.stages.attempts import begin_attempt, end_attempt, ends_noted, read_attempts
from tests.stages.pretrain.toy_training import context_in


def test_attempts_are_numbered_and_know_how_the_last_one_ended(tmp_path: Path) -> None:
    one, two = context_in(tmp_path), context_in(tmp_path, rank=0, world_size=2)
    assert read_attempts(one.scratch_dir) == []
    begin_attempt(one, 0)
    end_attempt(one.scratch_dir, RuntimeError("the loss was nan\nand more"))
    begin_attempt(one, 20)
    begin_attempt(one, 40)  # nobody lived to say why
    begin_attempt(two, 40)
    end_attempt(one.scratch_dir, RuntimeError("connection closed by baseline"))
    end_attempt(one.scratch_dir, "worker 1: the actor died")  # who knows more speaks last
    attempts = begin_attempt(two, 60)
    assert attempts == read_attempts(one.scratch_dir)
    unknown = "ended without a word: killed, or its machine lost"
    assert [(a.attempt, a.from_step, a.workers, a.cause) for a in attempts] == [
        (1, 0, 1, None),
        (2, 20, 1, "RuntimeError: the loss was nan"),
        (3, 40, 1, unknown),
        (4, 40, 2, f"{unknown}, or resized from 1 to 2 workers"),
        (5, 60, 2, "worker 1: the actor died"),
    ]


def test_only_the_first_worker_writes(tmp_path: Path) -> None:
    assert begin_attempt(context_in(tmp_path, rank=1, world_size=2), 0) == []
    assert not (tmp_path / "scratch" / "attempts.jsonl").exists()


def test_only_what_ends_an_attempt_is_its_end(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    with pytest.raises(ValueError, match="loss"), ends_noted(context.scratch_dir):
        begin_attempt(context, 0)
        raise ValueError("the loss was nan")
    with pytest.raises(ValueError, match="refused"), ends_noted(context.scratch_dir):
        raise ValueError("the corpus was refused before training began")
    assert begin_attempt(context, 20)[1].cause == "ValueError: the loss was nan"
