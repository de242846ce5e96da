"""Saving and resuming a training run: in the background or not, with one worker or many.

A save in the background copies the state (to pinned memory from a GPU), and training goes on while a thread writes,
hashes, syncs and commits it; one save at most is under way. Several workers each write their part into one directory
and agree on every stage of it over a process group of their own (gloo), so that a worker whose disk is full fails the
save on all of them, and none waits for ever.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from lazypipe.stages.contract import METRICS_FILE, Context, UserError
from lazypipe.stages.pretrain.checkpoint.directory import (
    CHECKPOINT_MANIFEST,
    commit_checkpoint,
    describe_durably,
    fsync,
    newest_checkpoint,
    open_partial,
    partial_checkpoint,
    prune_checkpoints,
)
from lazypipe.stages.pretrain.checkpoint.state import (
    RunState,
    Snapshot,
    check_resume_checkpoint,
    read_resume_checkpoint,
    take_snapshot,
    write_resume_checkpoint,
)
from lazypipe.stages.pretrain.parallel import check_process_group, from_first, together

Result = TypeVar("Result")


class CheckpointSaver:
    """The resume checkpoints of one run. Every method is called by all workers, in the same order.

    keep: resume checkpoints kept, the newest. keep_every: those of steps that it divides are kept as well.
    in_background: save from a copy of the state in host memory, while training goes on.

    Leaving it as a context manager waits for a save under way. Inside, a warning of torch about saving in one process
    is left out.
    """

    def __init__(
        self, context: Context, *, keep: int = 2, keep_every: int | None = None, in_background: bool = True
    ) -> None:
        self.context = context
        self.keep, self.keep_every, self.in_background = keep, keep_every, in_background
        self.folder = context.scratch_dir / "checkpoints"
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: tuple[int, Future[None]] | None = None
        self._stager: DefaultStager | None = None
        self._group: Any = None
        self._filters = ExitStack()

    def __enter__(self) -> CheckpointSaver:
        # torch says so although it was told `no_dist`. Filters belong to the process: the thread that writes cannot set
        # them for the length of a save without taking those of the training thread away.
        self._filters.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:  # what ended the training is the better reason
                raise
        finally:
            self._executor.shutdown()
            if self._stager is not None:
                self._stager.close()
            if self._group is not None:
                dist.destroy_process_group(self._group)
            self._filters.close()

    def resume(self, model: nn.Module, optimizer: torch.optim.AdamW, identity: Mapping[str, Any]) -> RunState:
        """The state of the newest intact checkpoint, loaded; a fresh one without.

        Worker 0 verifies and decides; the others must see the same manifest, or all refuse.
        """
        context = self.context
        check_process_group(context)
        if context.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        newest = self._from_first(lambda: newest_checkpoint(self.folder, context.warn))
        seen = self._together(lambda: None if newest is None else _manifest_digest(newest))
        if len(set(seen)) > 1:
            raise UserError(
                f"{sum(digest != seen[0] for digest in seen)} of {len(seen)} workers do not see the resume checkpoint "
                f"{newest} that worker 0 found; all workers must share one storage root"
            )
        if newest is None:
            return RunState()
        self._together(lambda: check_resume_checkpoint(newest, identity))
        return read_resume_checkpoint(newest, model, optimizer, context.rank, self._group)

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        state: RunState,
        identity: Mapping[str, Any],
        final: bool = False,
    ) -> None:
        """Commit a checkpoint of `state`, in the background if so asked, after the one under way.

        A disk that takes no more is a warning, and the checkpoints before stay, unless `final`, the last save before
        training is left: then it is OSError, and nothing is under way on return. Any other error is raised, of a save
        in the background by the next call.
        """
        self.wait()
        snapshot = take_snapshot(model, optimizer, state, identity)
        unlogged: OSError | None = None
        try:
            self.context.flush_metrics()
        except OSError as error:
            unlogged = error
        if final:
            try:
                self._commit(snapshot, unlogged)
            except OSError as error:
                raise OSError(
                    f"the state at step {state.step} cannot be saved below {self.folder}: {error}; make room and run "
                    "again, from the checkpoint before"
                ) from error
        elif self.in_background:
            copied = replace(snapshot, tensors=self._copy(snapshot.tensors))
            self._under_way = (state.step, self._executor.submit(self._commit, copied, unlogged))
        else:
            self._settle(state.step, partial(self._commit, snapshot, unlogged))

    def wait(self) -> None:
        """Until no save is under way."""
        if self._under_way is not None:
            step, future = self._under_way
            self._under_way = None
            self._settle(step, future.result)

    def _settle(self, step: int, save: Callable[[], None]) -> None:
        try:
            save()
        except OSError as error:
            self.context.warn(f"no checkpoint of step {step}: {error}; training goes on, with the checkpoints before")

    def _copy(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """A copy in host memory, in buffers kept from one save to the next (shards of DTensors stay DTensors)."""
        if self._stager is None:
            cuda = torch.cuda.is_available()
            options = StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
            self._stager = DefaultStager(options)
        copied = self._stager.stage(tensors)
        assert isinstance(copied, dict)
        return copied

    def _commit(self, snapshot: Snapshot, unlogged: OSError | None) -> None:
        """Write, sync, hash, manifest, rename, drop old ones: all of a save but the copy, in whatever thread.

        unlogged: why metrics of earlier steps are not on disk. A run resumed from here would not log them again.
        """
        first, step = self.context.rank == 0, snapshot.step
        target = partial_checkpoint(self.folder, step)
        try:
            self._from_first(lambda: self._open(step, unlogged))
            write = partial(write_resume_checkpoint, target, snapshot, self.context.rank, self._group)
            files = self._together(lambda: describe_durably(write()))
            every = {name: entry for part in files for name, entry in part.items()}
            self._from_first(lambda: self._close(step, every))
        except BaseException:
            if first:
                shutil.rmtree(target, ignore_errors=True)
            raise

    def _open(self, step: int, unlogged: OSError | None) -> None:
        if unlogged is not None:
            raise unlogged
        metrics = self.context.output_dir / METRICS_FILE
        if metrics.exists():
            fsync(metrics)
        open_partial(self.folder, step)

    def _close(self, step: int, files: Mapping[str, Mapping[str, Any]]) -> None:
        directory = partial_checkpoint(self.folder, step)
        committed = commit_checkpoint(directory, step, files, world_size=self.context.world_size)
        prune_checkpoints(committed, self.keep, self.keep_every)

    def _together(self, action: Callable[[], Result]) -> list[Result]:
        return together(action, self.context.world_size, self._group)

    def _from_first(self, action: Callable[[], Result]) -> Result:
        return from_first(action, self.context.rank, self.context.world_size, self._group)


def _manifest_digest(directory: Path) -> str:
    try:
        return hashlib.sha256((directory / CHECKPOINT_MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        return str(error)
