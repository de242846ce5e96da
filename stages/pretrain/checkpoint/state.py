"""What a training run needs to go on as if it had never stopped.

A resume checkpoint holds, in torch.distributed.checkpoint's format, the tensors of model and AdamW, each worker its
shards (__<rank>_0.distcp, .metadata); the random generators of each worker (random_states-<rank>.safetensors); and in
run.json and history.jsonl the identity of the run, its step, counters and metrics. The data order needs no state: it is
computed from the seed and the step.

The metadata is a pickle. It is read from a run's own scratch alone, after the manifest's sha256 has been met; whatever
is passed on is exported as safetensors, and no other stage or command reads a resume checkpoint.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lazypipe.stages.config import flatten, identity
from lazypipe.stages.contract import Artifact, UserError
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.pretrain.checkpoint.directory import CHECKPOINT_FORMAT, CHECKPOINT_MANIFEST, checkpoint_problem
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.random_states import random_states, set_random_states

DCP_METADATA = ".metadata"
RANDOM_FILE = "random_states-{rank}.safetensors"
RUN_FILE = "run.json"
HISTORY_FILE = "history.jsonl"


@dataclass(kw_only=True)
class RunState:
    """Where a run stands. step: optimizer steps done. history: the rows of tables/history."""

    step: int = 0
    loss: float | None = None  # of the last step whose loss was finite
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    spikes_skipped: int = 0
    recent_losses: list[float] = field(default_factory=list)  # what stages/pretrain/skipping.py judges a spike by
    recent_norms: list[float] = field(default_factory=list)
    train_seconds: float = 0.0
    wait_seconds: float = 0.0  # the part of train_seconds that went into making batches
    history: list[dict[str, float | None]] = field(default_factory=list)


def run_identity(config: PretrainConfig, corpus: Artifact) -> dict[str, Any]:
    """All that decides the weights, flat by name: identity fields of the config, and which corpus it is."""
    fields = _config_identity(config)
    facts = TokenizeFacts.read(corpus.manifest)
    fields["corpus.fingerprint"] = facts.source.fingerprint
    fields["corpus.vocab_size"] = facts.vocab_size
    fields["corpus.train_tokens"] = facts.splits["train"].tokens
    return fields


def _config_identity(config: PretrainConfig) -> dict[str, Any]:
    """The identity with its defaults, as JSON reads it back (lists, no tuples)."""
    fields: dict[str, Any] = json.loads(json.dumps(flatten(identity(config, defaults=True))))
    return fields


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds. tensors: {"model": ..., "optimizer": ...}, of plain tensors or of DTensors."""

    step: int
    tensors: dict[str, Any]
    random_states: dict[str, Tensor]
    run: dict[str, Any]
    history: list[dict[str, float | None]]


def take_snapshot(
    model: nn.Module, optimizer: torch.optim.AdamW, state: RunState, identity: Mapping[str, Any]
) -> Snapshot:
    """The state as it is now. The tensors are those in use, not copies; everything else training may change from here.

    Learning rates and the other numbers of the optimizer's groups are left out: they follow from config and step.
    """
    tensors: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer.state:  # the library fills an empty one by an update with zero gradients, which counts as a step
        tensors["optimizer"] = get_optimizer_state_dict(model, optimizer)["state"]
    fields = {name: copy.deepcopy(value) for name, value in vars(state).items() if name != "history"}
    run = {"identity": dict(identity), "state": fields}
    return Snapshot(state.step, tensors, random_states(), run, list(state.history))


def write_resume_checkpoint(directory: Path, snapshot: Snapshot, rank: int = 0, group: Any = None) -> list[Path]:
    """Write this worker's part of a checkpoint and return its files; all workers of `group` call it together.

    Tensors that all workers have are written by one of them each, shards of DTensors by their owners. OSError for a
    disk that takes no more; CheckpointException, on every worker, when one of several failed.
    """
    save(snapshot.tensors, storage_writer=_Writer(directory), process_group=group, no_dist=group is None)
    random_file = directory / RANDOM_FILE.format(rank=rank)
    save_file(snapshot.random_states, random_file)
    files = [*directory.glob(f"__{rank}_*"), random_file]
    if rank == 0:
        (directory / RUN_FILE).write_text(json.dumps(snapshot.run), encoding="utf-8")
        with (directory / HISTORY_FILE).open("w", encoding="utf-8") as file:
            for row in snapshot.history:  # by line: one json.dumps of a long history would hold up the training thread
                file.write(json.dumps(row) + "\n")
        files += [directory / name for name in (DCP_METADATA, RUN_FILE, HISTORY_FILE)]
    return files


def check_resume_checkpoint(directory: Path, identity: Mapping[str, Any]) -> None:
    """Refuse, naming the field, a checkpoint of another format, config or corpus, and one whose metadata is damaged.

    `directory` is one that `checkpoint_problem` cleared on one worker; before the metadata is unpickled, every worker
    holds it against the manifest once more. A field that the checkpoint does not know yet was at its default.
    """
    _refuse_old_format(directory)
    problem = checkpoint_problem(directory, only=(DCP_METADATA, RUN_FILE, HISTORY_FILE))
    if problem is not None:
        raise UserError(f"resume checkpoint {directory} is damaged: {problem}; delete it to go on from the one before")
    run = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
    other = other_identity(run["identity"], identity)
    if other is not None:
        name, before, now = other
        raise UserError(
            f"resume checkpoint {directory} was written with {name}={before}, this run has {name}={now}; "
            f"set it back, or delete {directory.parent} to start over"
        )


def read_resume_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.AdamW, rank: int = 0, group: Any = None
) -> RunState:
    """Load a checkpoint, written by any number of workers, into model, optimizer and the random generators.

    `directory` has passed `check_resume_checkpoint`. Refuses one that does not fit the model; nothing is changed then.
    """
    run = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
    reader = FileSystemReader(directory)
    saved = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {"model": get_model_state_dict(model)}
    found = {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in saved.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    expected = {name: tuple(tensor.shape) for name, tensor in tensors["model"].items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise UserError(
            f"resume checkpoint {directory} does not fit the model: {wrong[0]} is {found.get(wrong[0])}, expected "
            f"{expected.get(wrong[0])}; delete {directory.parent} to start over"
        )
    # A parameter without a gradient so far has no moments, in the checkpoint as in the run that wrote it.
    with_moments = [name for name in expected if f"optimizer.{name}.step" in saved]
    optimizer_state = get_optimizer_state_dict(model, optimizer) if with_moments else {}
    if with_moments:
        optimizer_state["state"] = {name: optimizer_state["state"][name] for name in with_moments}
        tensors["optimizer"] = optimizer_state["state"]
    load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    if with_moments:
        set_optimizer_state_dict(model, optimizer, optimizer_state, options=StateDictOptions(strict=False))
    set_model_state_dict(model, tensors["model"])
    random_file = directory / RANDOM_FILE.format(rank=rank)
    if random_file.exists():  # not for a worker that the run did not have before
        set_random_states(load_file(random_file))
    history = [json.loads(line) for line in (directory / HISTORY_FILE).read_text(encoding="utf-8").splitlines()]
    return RunState(**run["state"], history=history)


class _Writer(FileSystemWriter):
    """DCP's writer to files, which tells a full disk from other errors: torch.save hides it behind a RuntimeError."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _refuse_old_format(directory: Path) -> None:
    manifest = json.loads((directory / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("format", 1) != CHECKPOINT_FORMAT:
        raise UserError(
            f"resume checkpoint {directory} has format {manifest.get('format', 1)}, this version reads "
            f"{CHECKPOINT_FORMAT}; delete {directory.parent} to start over, or finish with the version that wrote it"
        )


def other_identity(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(name, found, expected) of the first field in which two identities of runs differ, or None.

    A field that an older one does not know yet was at its default.
    """
    defaults = _config_identity(PretrainConfig())
    for name in sorted(expected.keys() | found.keys()):
        before, now = found.get(name, defaults.get(name, "(absent)")), expected.get(name, "(absent)")
        if before != now:
            return name, before, now
    return None


def last_logged_step(metrics_file: Path) -> int:
    """Highest step in metrics.jsonl, 0 without one. A line torn by a crash is cut off first.

    A resumed run repeats the steps since its checkpoint and logs only what comes after this, so that every step is in
    the file once and a reader that follows it never sees it shrink by a whole line.
    """
    if not metrics_file.exists():
        return 0
    content = metrics_file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with metrics_file.open("r+b") as file:
            file.truncate(len(whole))
    return max((int(json.loads(line)["step"]) for line in whole.splitlines()), default=0)
