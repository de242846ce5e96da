"""A walker with a backend and a tracker that only write down what they are told: stages take no time."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lazypipe.pipeline.execution.backends import Capacity, Demand, Finished
from lazypipe.pipeline.execution.execute import StageTask
from lazypipe.pipeline.execution.progress import Display
from lazypipe.pipeline.execution.scheduler import Outcome, Walk
from lazypipe.pipeline.experiment.schema import compose
from lazypipe.pipeline.planning.plan import Node, Selection, build_nodes, decide
from lazypipe.pipeline.store.lease import held_by, myself
from lazypipe.pipeline.store.store import Entry, Generation, Store, read_generation
from lazypipe.pipeline.tracking.child_run import ChildRun
from tests.pipeline.store.filled_store import SMALL, SOURCE
from tests.stages.made_facts import tokenize_facts

# What a stage does when it is polled: an error, None to go on running, or the directory it committed.
Behaviour = Callable[["FakeBackend", StageTask, Sequence[str]], "BaseException | str | None"]


def commit_task(task: StageTask, input_paths: Sequence[str], text: str = "made here", **more: Any) -> str:
    """What execute_stage does at the end: a committed generation of the task's recipe."""
    (task.entry / task.generation / "result.txt").write_text(text)
    generations = [read_generation(Path(path)) for path in input_paths]
    inputs = {
        name: {"fingerprint": g.fingerprint, "generation": g.id}
        for name, g in zip(task.input_names, generations, strict=True)
    }
    body = more | {
        "fingerprint": task.fingerprint,
        "config": dict(task.config),
        "metrics": {},
        "facts": tokenize_facts(),
    }
    return str(Entry(task.entry).commit(task.generation, body | {"inputs": inputs, "variant": task.variant}).path)


class FakeBackend:
    """Ends one running stage per poll. `behaviours` by node id decide how; the default is to succeed."""

    inline = False

    def __init__(self, behaviours: Mapping[str, Behaviour] | None = None, cpus: float = 2.0):
        self.capacity = Capacity(cpus, 0.0, cpus, 0.0)
        self.behaviours = dict(behaviours or {})
        self.running: dict[str, tuple[StageTask, Sequence[str], Demand]] = {}
        self.started: list[str] = []
        self.tasks: dict[str, StageTask] = {}
        self.together: list[set[str]] = []
        self.cancelled: list[tuple[str, bool]] = []
        self.polls = 0

    def submit(self, task: StageTask, input_paths: Sequence[str], demand: Demand) -> None:
        assert held_by(task.entry, task.lease_token), "a stage starts only under its lease"
        (task.entry / task.generation).mkdir()
        self.started.append(task.node_id)
        self.tasks[task.node_id] = task
        self.running[task.node_id] = (task, input_paths, demand)
        assert sum(d.cpus for _, _, d in self.running.values()) <= self.capacity.cpus
        self.together.append(set(self.running))

    def poll(self, timeout_s: float) -> list[Finished]:  # noqa: ARG002
        self.polls += 1
        assert self.polls < 3000, "the walk does not end"
        for node_id, (task, input_paths, _) in list(self.running.items()):
            behaviour = self.behaviours.get(node_id, lambda _backend, t, paths: commit_task(t, paths))
            result = behaviour(self, task, input_paths)
            if result is None:
                continue
            del self.running[node_id]
            if isinstance(result, BaseException):
                return [Finished(node_id, None, result, f"Traceback of {node_id}")]
            return [Finished(node_id, result, None)]
        time.sleep(0.002)
        return []

    def cancel(self, node_id: str, force: bool) -> None:
        self.cancelled.append((node_id, force))

    def close(self) -> None:
        """Nothing to close."""


@dataclass
class FakeTracker:
    """Writes down what the walker says to MLflow."""

    uri: str = "fake:"
    parent_id: str = "parent"
    calls: list[tuple[str, ...]] = field(default_factory=list)

    def link(self, node: Node, generation: Generation) -> None:
        self.calls.append(("link", node.id, generation.id))

    def open_child(
        self,
        node: Node,
        scratch: Path,
        output_dir: Path,
        leftovers: Sequence[Path],
        rerun_of: str | None,  # noqa: ARG002
    ) -> ChildRun:
        assert scratch.is_dir() and all(directory.is_dir() for directory in leftovers)
        self.calls.append(("open", node.id, output_dir.name))
        return ChildRun(f"run of {node.id}", output_dir / "metrics.jsonl")

    def log_corpus(self, run_id: str, corpus: Generation, context: str) -> None:
        assert corpus.id.startswith("tokenize/")
        self.calls.append(("corpus", run_id, context))

    def finish_child(self, child: ChildRun, node: Node, generation: Generation) -> None:
        assert generation.problem() is None
        self.calls.append(("finish", node.id, child.run_id))

    def fail_child(self, child: ChildRun, status: str, error: str) -> None:
        self.calls.append(("fail", child.run_id, status, error))

    def pump(self, child: ChildRun) -> None:
        """Metrics are not looked at here."""


@dataclass
class Walked:
    outcomes: dict[str, Outcome]
    backend: FakeBackend
    tracker: FakeTracker
    store: Store
    nodes: dict[str, Node]
    said: str

    def states(self) -> dict[str, str]:
        return {node_id: outcome.state for node_id, outcome in self.outcomes.items()}


def small_nodes(**sections: Any) -> dict[str, Node]:
    return build_nodes(compose({**SMALL, **sections}), SOURCE)


def make_walk(
    store: Store,
    backend: FakeBackend,
    selection: Selection | None = None,
    sections: Mapping[str, Any] | None = None,
    full_check: bool = False,
    **fields: Any,
) -> tuple[Walk, FakeTracker, io.StringIO, dict[str, Node]]:
    experiment = compose({**SMALL, **(sections or {})})
    nodes = build_nodes(experiment, SOURCE)
    plan = decide(nodes, store, selection or Selection(), full_check)
    out, tracker = io.StringIO(), FakeTracker()
    display = Display(Console(file=out, width=200), list(plan))
    walk = Walk(plan, store, experiment, backend, tracker, display, myself("test"), **fields)  # type: ignore[arg-type]
    return walk, tracker, out, nodes


def walked(store: Store, backend: FakeBackend, **options: Any) -> Walked:
    walk, tracker, out, nodes = make_walk(store, backend, **options)
    outcomes = walk.run()
    for node in nodes.values():
        assert not held_by(store.entry(node.stage, node.fingerprint).path, walk.me.token), f"{node.id} is still leased"
    assert not walk.running
    return Walked(outcomes, backend, tracker, store, nodes, out.getvalue())


def fail(error: BaseException) -> Behaviour:
    return lambda _backend, _task, _paths: error
