"""Training runs of several real processes, one after another in one process group: a start costs more than a run."""

import json
import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lazypipe.stages.contract import Context, Interrupted
from lazypipe.stages.data.batches import Batches, Windows
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.parallel import whole
from lazypipe.stages.pretrain.trainer import Trainer
from tests.stages.pretrain.toy_training import context_in, read_artifact


@dataclass(frozen=True)
class Run:
    """stop_at: leave behind this step with a checkpoint; 0: train to the end."""

    directory: Path
    config: PretrainConfig
    stop_at: int = 0


class LeavingContext(Context):
    stop_at: int = 0
    step: int = 0

    def log_metrics(self, step: int, metrics: Any) -> None:
        self.step = step + 1  # all workers log every step; the next one is asked to be the last
        super().log_metrics(step, metrics)

    @property
    def stop_requested(self) -> bool:
        return self.step == self.stop_at > 0


@dataclass(frozen=True, kw_only=True)
class RecordingBatches(Batches):
    """Batches that write down what was read of them: (number of the micro-batch, tokens)."""

    read: list[tuple[int, str]] = field(default_factory=list)

    def training(self, number: int) -> Windows:
        windows = super().training(number)
        self.read.append((number, windows.tobytes().hex()))
        return windows


@dataclass(kw_only=True)
class RecordingTrainer(Trainer):
    """Leaves first_gradient-RANK.pt, clipped, and windows-RANK.jsonl ([step, first sample, tokens])."""

    def train(self) -> float:
        directory, rank = self.context.output_dir.parent, self.context.rank
        self.batches = RecordingBatches(**vars(self.batches))

        def keep_first_gradient(*_: object) -> None:
            first.remove()
            flat = torch.cat([whole(p.grad).flatten() for p in self.parameters if p.grad is not None])
            torch.save(flat, directory / f"first_gradient-{rank}.pt")

        first = self.optimizer.register_step_pre_hook(keep_first_gradient)
        try:
            return super().train()
        finally:
            per_step, size = self.config.micro_batches_per_step, self.config.micro_batch_size
            with (directory / f"windows-{rank}.jsonl").open("a") as file:
                for number, tokens in self.batches.read:
                    file.write(json.dumps([number // per_step, number * size, tokens]) + "\n")


def train_here(corpus: Path, run: Run, rank: int = 0, world_size: int = 1) -> None:
    """Train; leaves what `RecordingTrainer` does, and result-RANK.json."""
    run.directory.mkdir(exist_ok=True)
    plain = context_in(run.directory, rank, world_size)
    context = LeavingContext(plain.output_dir, plain.scratch_dir, rank=rank, world_size=world_size)
    context.stop_at = run.stop_at
    try:
        outputs = pretrain.run(run.config, {"tokenize": read_artifact(corpus)}, context, RecordingTrainer)
        result: dict[str, Any] = {"facts": outputs.facts.to_json(), "metrics": outputs.metrics}
    except Interrupted as interrupted:
        result = {"interrupted": str(interrupted)}
    (run.directory / f"result-{rank}.json").write_text(json.dumps(result), encoding="utf-8")


def _worker(corpus: Path, runs: list[Run], rank: int, world_size: int, rendezvous: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    for run in runs:
        train_here(corpus, run, rank, world_size)
    torch.distributed.destroy_process_group()


def train_on(corpus: Path, runs: list[Run], world_size: int, rendezvous: Path) -> None:
    """All `runs` on `world_size` processes of one thread each; AssertionError when one of them fails."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    workers = [
        server.Process(target=_worker, args=(corpus, runs, rank, world_size, rendezvous)) for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0] * world_size


def windows_read(directory: Path, micro_batches: int, sharded: bool = False) -> list[list[list[Any]]]:
    """Of every step trained in `directory`, by all workers: its [first sample, tokens], in global order.

    sharded: idle workers read a micro-batch of the step again, to go through the motions with.
    """
    entries = [json.loads(line) for file in directory.glob("windows-*.jsonl") for line in file.read_text().splitlines()]
    steps = sorted({entry[0] for entry in entries})
    found = [sorted(entry[1:] for entry in entries if entry[0] == step) for step in steps]
    if sharded:
        found = [[entry for n, entry in enumerate(step) if entry not in step[:n]] for step in found]
    assert all(len(step) == micro_batches for step in found), "a micro-batch was read twice, or by nobody"
    return found


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "output" / "checkpoint" / "model.safetensors")


def result_of(directory: Path, rank: int = 0) -> dict[str, Any]:
    return dict(json.loads((directory / f"result-{rank}.json").read_text()))
