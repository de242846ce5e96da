"""One run, two accidents at random points: the same bits as without, and every step logged once.

The stage alone, in processes of its own; the one below tests/pipeline does the same to whole runs (`make chaos`).
"""

import functools
import json
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from safetensors.torch import load_file

from lazypipe.stages.pretrain.checkpoint.directory import checkpoint_step
from tests.accidents import (
    committed,
    damage_newest,
    first_logged_step,
    train_on_a_full_disk,
    wait_for_checkpoint,
    wait_until,
)
from tests.stages.pretrain.toy_training import start_process, tiny_run, toy_corpus

STEPS, EVERY = 80, 5
ACCIDENTS = ("damage", "disk_full")  # both end in kill -9


def test_a_run_with_accidents_ends_as_the_undisturbed_one(tmp_path: Path, chaos_seed: int) -> None:
    rng = random.Random(chaos_seed)
    corpus = toy_corpus(tmp_path / "corpus").path.parent
    config = tiny_run("lazy", steps=STEPS, checkpoint_every=EVERY, validate_every=STEPS)
    calm, scratch = tmp_path / "calm", tmp_path / "scratch"
    undisturbed = start_process(corpus, calm, config)
    scratch.mkdir()

    def attempt(number: int) -> tuple[Path, BaseProcess]:
        """An output directory of its own over the common scratch, as every execution of a stage has."""
        directory = tmp_path / f"attempt-{number}"
        directory.mkdir()
        (directory / "scratch").symlink_to(scratch)
        return directory, start_process(corpus, directory, config)

    logged: list[int] = []
    before = 0
    for number, accident in enumerate([*rng.sample(ACCIDENTS, len(ACCIDENTS)), "none"]):
        directory, process = attempt(number)
        metrics = directory / "output" / "metrics.jsonl"
        wait_until(functools.partial(first_logged_step, metrics), process.is_alive, "a step")
        assert first_logged_step(metrics) == before + 1, "went on from the newest intact checkpoint"
        if accident != "none":  # two checkpoints on: one to damage, one to fall back on
            wait_for_checkpoint(scratch, before + 2 * EVERY, process.is_alive)
            time.sleep(rng.uniform(0, 0.05))
            before = strike(accident, process, scratch, metrics, rng)
            print(f"attempt {number}: {accident}, to go on from step {before}")
            assert before > 0
        process.join(120)
        steps = [json.loads(line)["step"] for line in metrics.read_bytes().split(b"\n")[:-1]]
        logged += [step for step in steps if not logged or step > logged[-1]]

    assert number == len(ACCIDENTS)
    result = json.loads((directory / "result-0.json").read_text())
    assert (result["facts"]["resumed_from"], result["facts"]["steps_executed"]) == (before, STEPS - before)
    assert logged == [*range(1, STEPS + 1)]
    undisturbed.join(120)
    expected, found = (load_file(run / "output" / "checkpoint" / "model.safetensors") for run in (calm, directory))
    assert all(tensor.equal(found[name]) for name, tensor in expected.items()) and expected.keys() == found.keys()


def strike(accident: str, process: BaseProcess, scratch: Path, metrics: Path, rng: random.Random) -> int:
    """Kill the process; returns the step of the checkpoint that the next attempt must go on from."""
    pid = process.pid
    assert pid is not None
    if accident == "disk_full":
        train_on_a_full_disk(pid, scratch, metrics, EVERY, process.is_alive)
    os.kill(pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    if accident == "damage":
        print(damage_newest(scratch, rng.choice(["flip", "truncate", "manifest"]), rng))
    return checkpoint_step(committed(scratch)[-1])
