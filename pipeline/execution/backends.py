"""Where stages execute: in Ray tasks declared as a Ray DAG, or one after another in this process (--local).

A backend has `capacity` (what stages may occupy), `submit`, `poll`, `cancel` and `close`. scheduler.py decides when a
node may start; a backend only starts it and says how it ended.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from lazypipe.pipeline.execution.execute import MapFunction, StageTask, execute_stage, map_in_processes, sigterm_saves
from lazypipe.pipeline.experiment.resources import StageResources, WorkerResources
from lazypipe.pipeline.experiment.schema import Experiment
from lazypipe.pipeline.planning.code_version import PROJECT
from lazypipe.pipeline.planning.plan import Node
from lazypipe.stages.contract import UserError, first_line
from lazypipe.stages.registry import stage_row


@dataclass(frozen=True)
class Capacity:
    """cpus/gpus of the whole cluster and of its largest node; `nodes` holds (cpus, gpus) of each, [] for one node."""

    cpus: float
    gpus: float
    node_cpus: float
    node_gpus: float
    nodes: tuple[tuple[float, float], ...] = ()

    def workers(self, cpus: float, gpus: float) -> int:
        """How many workers of so many cpus > 0 and gpus fit: none is cut in two by the border between nodes."""
        nodes = self.nodes or ((self.cpus, self.gpus),)
        # 1.0 // 0.2 is 4: rounding must not cost a worker.
        return sum(int(min(c / cpus, g / gpus if gpus else c / cpus) + 1e-9) for c, g in nodes)


@dataclass(frozen=True)
class Demand:
    """What a node occupies while it runs. `task_*` is what its stage task itself holds."""

    cpus: float
    gpus: float
    task_cpus: float
    task_gpus: float
    threads: int


@dataclass(frozen=True)
class Finished:
    node_id: str
    path: str | None
    error: BaseException | None
    traceback: str = ""


class Backend(Protocol):
    """`inline`: submit returns only when the stage has ended."""

    capacity: Capacity
    inline: bool

    def submit(self, task: StageTask, input_paths: Sequence[str], demand: Demand) -> None: ...

    def poll(self, timeout_s: float) -> list[Finished]: ...

    def cancel(self, node_id: str, force: bool) -> None: ...

    def close(self) -> None: ...


def demand_of(node: Node, experiment: Experiment, capacity: Capacity) -> Demand:
    """Resources of a node from the experiment file and the machine; what cannot be had is refused."""
    resources = experiment.resources[node.stage]
    where = f"resources.{node.stage}"
    if isinstance(resources, WorkerResources) and not resources.in_task:
        fewest, most = resources.worker_range
        cpus_each, gpus_each = resources.cpus_per_worker, resources.gpus_per_worker
        _require(f"{where}: {fewest} workers x {gpus_each:g} =", fewest * gpus_each, capacity.gpus, "GPU")
        _require(f"{where}: {fewest} workers x {cpus_each:g} =", fewest * cpus_each, capacity.cpus, "CPU")
        _require(f"{where}.gpus_per_worker", gpus_each, capacity.node_gpus, "GPU on one node,")
        _require(f"{where}.cpus_per_worker", cpus_each, capacity.node_cpus, "CPU on one node,")
        room = capacity.workers(cpus_each, gpus_each)
        _require(f"{where}: {fewest} workers of {cpus_each:g} CPU and {gpus_each:g} GPU,", fewest, room, "workers")
        workers = min(most, room)  # a range takes what there is; Ray Train goes up to `most` when nodes join
        return Demand(workers * cpus_each, workers * gpus_each, 0, 0, resources.threads or max(1, int(cpus_each)))
    cpus = resources.cpus or (capacity.node_cpus if node.row.whole_machine else min(1.0, capacity.node_cpus))
    gpus = resources.gpus if isinstance(resources, StageResources) else 0.0
    shares = node.row.map_workers(node.config)
    if shares > 1:
        # While the stage waits for its workers it lends them its cores, but keeps its GPU.
        asked = f"{where}: {node.stage}.{node.row.map_workers_key}={shares}"
        _require(f"{asked} x {cpus:g} =", shares * cpus, capacity.cpus, "CPU")
        _require(
            f"{asked} and the stage itself, (1 + {shares}) x {gpus:g} =", (1 + shares) * gpus, capacity.gpus, "GPU"
        )
    _require(f"{where}.gpus", gpus, capacity.node_gpus, "GPU on one node,")
    _require(f"{where}.cpus", cpus, capacity.node_cpus, "CPU on one node,")
    total_gpus = gpus if shares == 1 else (1 + shares) * gpus
    return Demand(shares * cpus, total_gpus, cpus, gpus, resources.threads or max(1, int(cpus)))


def _require(what: str, asked: float, present: float, unit: str) -> None:
    if asked > present:
        raise UserError(f"{what} {asked:g} {unit} asked for, but {present:g} present; lower it or use a larger cluster")


class LocalBackend:
    """Stages one after another in this process: the debugger's path."""

    inline = True

    def __init__(self) -> None:
        import importlib.util

        cpus = float(len(os.sched_getaffinity(0)))
        gpus = 0.0
        if importlib.util.find_spec("torch") is not None:
            import torch

            gpus = float(torch.cuda.device_count())
        self.capacity = Capacity(cpus, gpus, cpus, gpus)
        self._finished: list[Finished] = []

    def submit(self, task: StageTask, input_paths: Sequence[str], demand: Demand) -> None:
        if task.resources.get("workers", 1) != 1:
            raise UserError(
                f"resources.{task.stage}.workers={task.resources['workers']}: --local trains in one process; "
                "set it to 1 or leave --local out"
            )
        try:
            path = execute_stage(task, input_paths, map_in_processes(max(1, int(demand.cpus))))
            self._finished.append(Finished(task.node_id, path, None))
        except Exception as error:
            import traceback

            self._finished.append(Finished(task.node_id, None, error, traceback.format_exc()))

    def poll(self, timeout_s: float) -> list[Finished]:
        finished, self._finished = self._finished, []
        if not finished:
            time.sleep(timeout_s)
        return finished

    def cancel(self, node_id: str, force: bool) -> None:
        """Nothing runs beside the caller."""

    def close(self) -> None:
        """Nothing to close."""


class RayBackend:
    """Stages as tasks of a Ray DAG: the graph is declared with `.bind()`, the walker submits its nodes.

    to_run: ids of the nodes that will be submitted. What the others would need is nobody's concern: a corpus can be
    tokenized where no GPU is.
    """

    inline = False

    def __init__(
        self, address: str | None, nodes: Mapping[str, Node], to_run: Collection[str], experiment: Experiment
    ) -> None:
        self._empty: TemporaryDirectory[str] | None = None
        own = address is None
        if address is None:
            # Our own cluster is local and takes a token of its own, so that no other user's process joins it.
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            os.environ.pop("RAY_ADDRESS", None)
        else:
            from lazypipe.pipeline.cluster.submit import check_join

            check_join(address)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray = ray
        try:
            with signal_handlers_kept(), working_directory(self._worker_directory()):
                ray.init(
                    address="local" if own else address,
                    include_dashboard=False if own else None,
                    configure_logging=True,
                    logging_level="WARNING",
                    log_to_driver=True,
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"Ray cluster at {address}: cannot be joined: {first_line(error)}; if it asks for a token, set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from error
        totals = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.capacity = Capacity(
            cpus=sum(r.get("CPU", 0.0) for r in totals),
            gpus=sum(r.get("GPU", 0.0) for r in totals),
            node_cpus=max((r.get("CPU", 0.0) for r in totals), default=0.0),
            node_gpus=max((r.get("GPU", 0.0) for r in totals), default=0.0),
            nodes=tuple((r.get("CPU", 0.0), r.get("GPU", 0.0)) for r in totals),
        )
        demands = {
            node_id: demand_of(node, experiment, self.capacity) for node_id, node in nodes.items() if node_id in to_run
        }
        self._stage = ray.remote(_stage_task)
        self.dag = self._declare(nodes, demands)
        self._declared = _declared_nodes(self.dag)
        self._running: dict[Any, str] = {}

    def _worker_directory(self) -> Path:
        """The directory that ray.init puts first on the module path of its workers: an empty one, kept until `close`.

        In the user's own, a model.py, a kernels/ or another checkout of this project would be imported in place of what
        is installed. Where this process itself imports lazypipe from its working directory (`python -m lazypipe` in a
        checkout), the workers need that one.
        """
        here = Path.cwd()
        if Path(sys.path[0]).resolve() == here == PROJECT:  # an empty entry is the working directory
            return here
        self._empty = TemporaryDirectory(prefix="lazypipe-workers-", ignore_cleanup_errors=True)
        return Path(self._empty.name)

    def _declare(self, nodes: Mapping[str, Node], demands: Mapping[str, Demand]) -> Any:
        """The experiment as a Ray DAG: `InputNode[node id]` carries each node's StageTask."""
        from ray.dag import InputNode, MultiOutputNode

        bound: dict[str, Any] = {}
        with InputNode() as tasks:
            for node in nodes.values():
                options: dict[str, Any] = {"name": node.id, "max_retries": 0}
                if node.id in demands:
                    options |= {"num_cpus": demands[node.id].task_cpus, "num_gpus": demands[node.id].task_gpus}
                upstream = [bound[origin] for origin in node.inputs.values()]
                bound[node.id] = self._stage.options(**options).bind(tasks[node.id], *upstream)
        return MultiOutputNode(list(bound.values()))

    def submit(self, task: StageTask, input_paths: Sequence[str], demand: Demand) -> None:  # noqa: ARG002
        """Submit one declared node; its upstream nodes are replaced by their (cached or fresh) results."""
        options, upstream = self._declared[task.node_id]
        assert len(upstream) == len(input_paths), f"{task.node_id} is declared on {upstream}"
        reference = self._stage.options(**options).remote(task, *input_paths)
        self._running[reference] = task.node_id

    def poll(self, timeout_s: float) -> list[Finished]:
        if not self._running:
            time.sleep(timeout_s)
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        finished = []
        for reference in done:
            node_id = self._running.pop(reference)
            try:
                finished.append(Finished(node_id, self._ray.get(reference), None))
            except self._ray.exceptions.RayTaskError as error:
                finished.append(Finished(node_id, None, error.cause or error, str(error)))
            except self._ray.exceptions.RayError as error:
                finished.append(Finished(node_id, None, error, str(error)))
        return finished

    def cancel(self, node_id: str, force: bool) -> None:
        for reference, running in self._running.items():
            if running == node_id:
                self._ray.cancel(reference, force=force, recursive=True)

    def close(self) -> None:
        self._ray.shutdown()
        if self._empty is not None:
            self._empty.cleanup()


@contextmanager
def working_directory(directory: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(here)


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Python's handlers of SIGINT and SIGTERM are the process's again at the end, whatever was installed meanwhile.

    ray.init takes SIGTERM twice: from Python, and below it for a C++ handler that prints a stack and then calls the
    handler before it or, now and then, ends the process at once. Runs were left RUNNING by `ray job stop`.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _declared_nodes(dag: Any) -> dict[str, tuple[dict[str, Any], tuple[str, ...]]]:
    """Walk a declared DAG bottom up: options and upstream node ids by node id.

    `DAGNode.execute()` is deprecated since Ray 2.56 and cannot leave out what is cached, so the walker submits nodes.
    """
    from ray.dag import FunctionNode

    declared: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {}

    def visit(node: Any) -> Any:
        if not isinstance(node, FunctionNode):
            return node
        options = node.get_options()
        _, *upstream = node.get_args()  # the stage task, then the upstream nodes, already replaced by their ids
        declared[options["name"]] = (options, tuple(upstream))
        return options["name"]

    dag.apply_recursive(visit)
    return declared


def _stage_task(task: StageTask, *input_paths: str) -> str:
    """The body of every DAG node."""
    from lazypipe.pipeline.execution.ray_train import run_on_workers

    row = stage_row(task.stage)
    on_workers = row.on_workers and not WorkerResources.model_validate(task.resources).in_task
    mapping: MapFunction = map_with_ray
    if row.maps_with_own_resources:
        held = StageResources.model_validate(task.resources)
        mapping = partial(map_with_ray, cpus=held.cpus or 1.0, gpus=held.gpus)
    with sigterm_saves(task.entry / "scratch") if row.saves_on_stop else nullcontext():
        return execute_stage(task, input_paths, mapping, run=run_on_workers if on_workers else None)


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one task per core already
    return function(item)


def map_with_ray(
    function: Callable[[Any], Any], items: Iterable[Any], cpus: float = 1.0, gpus: float = 0.0
) -> Iterator[Any]:
    """An ordered map over Ray tasks. While the caller waits, Ray lends them the cores its own task holds."""
    import ray

    todo = list(items)
    if len(todo) <= 1:
        yield from map(function, todo)
        return
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(_call)
    function_reference = ray.put(function)
    window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: deque[Any] = deque()
    remaining = iter(todo)
    for item in remaining:
        pending.append(remote.remote(function_reference, item))
        if len(pending) >= window:
            yield _result(ray, pending.popleft())
    while pending:
        yield _result(ray, pending.popleft())


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from error
