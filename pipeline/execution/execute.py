"""One execution of one stage, from inputs to a committed generation: in a Ray task or, with --local, in the driver.

lease (held by the driver) -> generation directory -> stage.run(config, inputs, context) -> manifest -> current
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lazypipe.pipeline.planning.code_version import code_version
from lazypipe.pipeline.store.lease import held_by
from lazypipe.pipeline.store.store import Entry, Generation, read_generation
from lazypipe.stages.attempts import ends_noted
from lazypipe.stages.config import StageConfig, operational_fields
from lazypipe.stages.contract import Artifact, Context, Outputs
from lazypipe.stages.facts import Facts
from lazypipe.stages.registry import stage_row
from lazypipe.stages.signals import handled_signals
from lazypipe.stages.warning_lines import read_warnings

RECORDED_VERSIONS = (
    *("torch", "triton", "ray", "mlflow", "tokenizers", "transformers", "datasets", "pyarrow", "numpy"),
    "lm_eval",
)

MapFunction = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
RunStage = Callable[["StageTask", StageConfig, Mapping[str, Artifact], MapFunction], Outputs[Facts]]


@dataclass(frozen=True)
class StageTask:
    """Everything an execution needs, picklable. `inputs` maps input names to committed generation directories."""

    node_id: str
    stage: str
    variant: str | None
    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    source: Mapping[str, Any]
    fingerprint: str
    entry: Path
    generation: str
    lease_token: str
    threads: int
    experiment: str
    tracking: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)
    input_names: tuple[str, ...] = ()
    code_sha256: str | None = None  # of the stage's code, as planning compares it


class LeaseLostError(RuntimeError):
    """Another run took over the recipe while this one was executing it."""


def execute_stage(
    task: StageTask, input_paths: Sequence[str], map_function: MapFunction, run: RunStage | None = None
) -> str:
    """Run a stage and commit its generation; returns the generation's directory. `input_paths` follow input_names."""
    entry = Entry(task.entry)
    config = stage_row(task.stage).config.model_validate(task.config)
    generations = {name: read_generation(Path(path)) for name, path in zip(task.input_names, input_paths, strict=True)}
    for name, generation in generations.items():
        problem = generation.problem(full=True)
        if problem is not None:
            raise RuntimeError(
                f"{task.node_id}: its input {name} was damaged meanwhile: {problem}; run again to repair it"
            )
    inputs = {name: generation.artifact() for name, generation in generations.items()}
    output_dir = task.entry / task.generation
    output_dir.mkdir(parents=True, exist_ok=False)

    started, clock = datetime.now(UTC), time.perf_counter()
    outputs = (run or run_in_process)(task, config, inputs, map_function)
    seconds = time.perf_counter() - clock

    if not held_by(task.entry, task.lease_token):
        raise LeaseLostError(f"{task.node_id}: another run took over {task.entry}; its result is used instead")
    manifest = _manifest(task, config, generations, outputs, started, seconds)
    return str(entry.commit(task.generation, manifest).path)


def run_in_process(
    task: StageTask, config: StageConfig, inputs: Mapping[str, Artifact], map_function: MapFunction
) -> Outputs[Facts]:
    """Call the stage's function here, with the thread count the experiment gives it."""
    row = stage_row(task.stage)
    if row.uses_torch:
        import torch

        torch.set_num_threads(task.threads)  # a reused worker process keeps the last stage's count
    context = Context(task.entry / task.generation, task.entry / "scratch", map_function=map_function)
    run = row.load()
    with ends_noted(context.scratch_dir), context.routed_warnings():
        outputs: Outputs[Facts] = run(config, inputs, context)
    return outputs


@contextmanager
def sigterm_saves(scratch: Path) -> Iterator[None]:
    """Inside, SIGTERM asks the stage to save and leave as the driver does, by a file in its scratch directory.

    For a stage process that is ended by itself: by whoever drains its node, or by hand.
    """

    with handled_signals(lambda _: (scratch / "stop").touch(), (signal.SIGTERM,)):
        yield


def _manifest(
    task: StageTask,
    config: StageConfig,
    inputs: Mapping[str, Generation],
    outputs: Outputs[Facts],
    started: datetime,
    seconds: float,
) -> dict[str, Any]:
    facts = outputs.facts.to_json()
    json.dumps(facts, allow_nan=False)  # a stage that returns anything else is wrong here, not at the next read
    manifest: dict[str, Any] = {
        "stage": task.stage,
        "variant": task.variant,
        "experiment": task.experiment,
        "fingerprint": task.fingerprint,
        "stage_version": type(config).STAGE_VERSION,
        "config": config.model_dump(mode="json"),
        "identity": dict(task.identity),
        "source": dict(task.source),
        "operational": json.loads(json.dumps(operational_fields(config))),
        "resources": dict(task.resources),
        "inputs": {name: {"fingerprint": g.fingerprint, "generation": g.id} for name, g in inputs.items()},
        "metrics": outputs.metrics,
        "facts": facts,
        "warnings": read_warnings(task.entry / "scratch"),
        "created": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "threads": task.threads,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions()},
        "code": code_version().as_manifest() | {"stage_sha256": task.code_sha256},
        "tracking": dict(task.tracking),
    }
    for name in ("resumed_from", "steps_executed"):
        if name in facts:
            manifest[name] = facts[name]
    return manifest


def _versions() -> dict[str, str]:
    found = {}
    for package in RECORDED_VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def map_in_processes(max_workers: int) -> MapFunction:
    """An ordered map over worker processes that end with their parent, however it ends."""

    def mapping(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        todo = list(items)
        workers = min(max_workers, len(todo))
        if workers <= 1:
            yield from map(function, todo)
            return
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_die_with_parent) as pool:
            yield from pool.map(function, todo)

    return mapping


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends: a pool worker would wait for work for ever otherwise."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
