"""One `lazypipe run`: check, plan, walk, report. Imports torch, ray and mlflow only if something is to be computed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lazypipe.pipeline.execution.progress import Display
from lazypipe.pipeline.execution.scheduler import Outcome, Walk
from lazypipe.pipeline.experiment.resources import WorkerResources
from lazypipe.pipeline.experiment.schema import Experiment, resolve_root
from lazypipe.pipeline.planning.fingerprint import canonical
from lazypipe.pipeline.planning.plan import Plan, Selection, build_nodes, decide, report_of
from lazypipe.pipeline.planning.preflight import check_baselines, check_disk, check_root, inspect_sources
from lazypipe.pipeline.store import lease
from lazypipe.pipeline.store.store import Generation, Store
from lazypipe.pipeline.tracking.tracker import Tracker
from lazypipe.pipeline.tracking.uri import probe, tracking_uri
from lazypipe.stages.contract import UserError, first_line
from lazypipe.stages.report.table import terminal_rows
from lazypipe.stages.signals import handled_signals
from lazypipe.stages.stage_row import load_function

DONE, FAILED, USER_ERROR = 0, 1, 2


@dataclass(frozen=True)
class RunOptions:
    selection: Selection = field(default_factory=Selection)
    local: bool = False
    root: str | None = None
    address: str | None = None
    wait: bool = True
    rerun_of: str | None = None
    command: str = "lazypipe run"


def make_plan(experiment: Experiment, root: Path, selection: Selection, full_check: bool) -> tuple[Plan, int]:
    """(plan, bytes of the corpus). Cached inputs of stages that will run are verified in full when `full_check`."""
    sources = inspect_sources(experiment, root)
    nodes = build_nodes(sources.experiment, sources.identity)
    plan = decide(nodes, Store(root), selection)
    if full_check and any(d.action == "run" for d in plan.values()):
        plan = decide(nodes, Store(root), selection, full_check=True)
    return plan, sources.text_bytes


def run_experiment(experiment: Experiment, options: RunOptions, console: Console) -> int:
    """Execute an experiment; returns the exit code."""
    root = resolve_root(experiment, options.root)
    check_root(root)
    plan, corpus_bytes = make_plan(experiment, root, options.selection, full_check=True)
    to_run = [d for d in plan.values() if d.action == "run"]
    for decision in plan.values():
        if decision.node.row.check_publish is not None:
            load_function(decision.node.row.check_publish)(decision.node.config)
    stored_report = report_of(plan)
    if not to_run:
        publish({node_id: decision.generation for node_id, decision in plan.items()}, plan, console)
        _say(console, f"{experiment.name}: everything asked for is cached below {root}")
        print_report(None if stored_report is None else stored_report.generation, root, console)
        return DONE
    if options.address is None:
        check_baselines(plan)
    uri = tracking_uri(root)
    probe(uri)
    check_disk(plan, root, corpus_bytes)
    command = " ".join([options.command, *sys.argv[2:]]) if len(sys.argv) > 2 else options.command
    me = lease.myself(command[:200])
    store = Store(root)
    if not options.wait:
        _refuse_held(plan, store)
    print_plan(plan, console)
    for decision in to_run:
        if decision.damage is not None:
            _say(console, f"warning: {decision.node.id} is recomputed: {decision.damage}")
    with caught_signals() as caught:
        return _execute(experiment, options, console, plan, store, uri, me, caught)


def _execute(
    experiment: Experiment,
    options: RunOptions,
    console: Console,
    plan: Plan,
    store: Store,
    uri: str,
    me: lease.Holder,
    caught: CaughtSignal,
) -> int:
    # Before torch is imported, here and in every Ray worker: waiting OpenMP threads sleep instead of spinning. On two
    # cores that other processes use as well, spinning threads take the time that the others wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lazypipe.pipeline.execution.backends import Backend, LocalBackend, RayBackend, demand_of

    nodes = {node_id: d.node for node_id, d in plan.items()}
    to_run = [node_id for node_id, d in plan.items() if d.action == "run"]
    if options.local:
        _refuse_several_workers(experiment, {nodes[node_id].stage for node_id in to_run})
    store.root.mkdir(parents=True, exist_ok=True)
    caught.on_signal = lambda: False  # until there is a walk to stop, a signal is only remembered
    backend: Backend = LocalBackend() if options.local else RayBackend(options.address, nodes, to_run, experiment)
    display = Display(console, list(plan))
    try:
        if caught.number is not None:
            _say(console, "interrupted")
            return 128 + caught.number
        for node_id in to_run:
            demand_of(nodes[node_id], experiment, backend.capacity)
        tracker = start_tracking(uri, experiment, plan, store, me, options.rerun_of)
        walk = Walk(
            plan,
            store,
            experiment,
            backend,
            tracker,
            display,
            me,
            wait=options.wait,
            rerun_of=options.rerun_of,
            stop_signal=lambda: caught.number,
        )
        caught.on_signal = walk.interrupt
        display.start()
        try:
            outcomes = walk.run()
        except BaseException:
            tracker.finish("FAILED", None)
            raise
        finally:
            display.stop()
        report = next((outcomes[i] for i, node in nodes.items() if node.row.makes_report), Outcome("skipped"))
        killed = caught.number is not None or any(o.state == "killed" for o in outcomes.values())
        failed = any(o.state in ("failed", "blocked") for o in outcomes.values())
        tracker.finish(
            "KILLED" if killed else "FAILED" if failed else "FINISHED",
            report.generation if report.state == "done" else None,
        )
    finally:
        backend.close()
    if killed:
        _say(console, "interrupted; the next run goes on from here")
        return 128 + (caught.number or signal.SIGINT)
    publish({node_id: outcome.generation for node_id, outcome in outcomes.items()}, plan, console)
    if failed:
        return print_failures(outcomes, console)
    if report.generation is not None:
        print_report(report.generation, store.root, console)
    print_where_to_look(report.generation, store.root, uri, tracker.parent_id, console)
    return DONE


def _refuse_several_workers(experiment: Experiment, stages: Iterable[str]) -> None:
    """With --local a stage runs in one process, whatever its resources ask for."""
    for stage in stages:
        held = experiment.resources[stage]
        if isinstance(held, WorkerResources) and held.worker_range[1] > 1:
            raise UserError(
                f"resources.{stage}.workers={held.workers}: --local trains in one process; set it to 1 or leave "
                "--local out"
            )


def publish(stored: Mapping[str, Generation | None], plan: Plan, console: Console) -> None:
    """Let stages send their stored results to where their Configs say, such as `tokenize.copy_to`."""
    for node_id, generation in stored.items():
        node = plan[node_id].node
        if generation is not None and node.row.publish is not None:
            text = load_function(node.row.publish)(node.config, generation.path)
            if text is not None:
                _say(console, f"{node_id}: {text}")


def start_tracking(
    uri: str, experiment: Experiment, plan: Plan, store: Store, me: lease.Holder, rerun_of: str | None
) -> Tracker:
    """The tracker with its parent run open. What MLflow cannot open is refused: nothing was computed yet."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        tracker = Tracker(uri, store.root, experiment, me)
        tracker.start(plan, pipeline_key(plan), me.command, rerun_of)
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise UserError(
            f"MLflow at {uri} cannot be used: {type(error).__name__}: {first_line(error)}; correct "
            "MLFLOW_TRACKING_URI, or move a damaged database away (the stage store does not need it)"
        ) from error
    return tracker


def pipeline_key(plan: Plan) -> str:
    """Identifies an experiment's recipes as a whole: equal for equal plans, whatever is cached."""
    return hashlib.sha256(canonical({i: d.node.fingerprint for i, d in plan.items()}).encode()).hexdigest()[:32]


def _refuse_held(plan: Plan, store: Store) -> None:
    for decision in plan.values():
        holder = lease.living_holder(store.entry(decision.node.stage, decision.node.fingerprint).path)
        if decision.action == "run" and holder is not None:
            raise UserError(
                f"{decision.node.id}: {holder.describe()} is executing it now; leave --no-wait out to wait for it"
            )


# ---- signals


@dataclass
class CaughtSignal:
    """`on_signal` reacts to the first signal and says whether the main thread must be interrupted at once."""

    number: int | None = None
    on_signal: Callable[[], bool] | None = None


@contextmanager
def caught_signals() -> Iterator[CaughtSignal]:
    """The first SIGINT or SIGTERM asks for an orderly stop; a second one is a KeyboardInterrupt."""
    caught = CaughtSignal()

    def handle(number: int) -> None:
        first = caught.number is None
        caught.number = caught.number or number
        interrupt_now = caught.on_signal() if first and caught.on_signal is not None else True
        if interrupt_now:
            raise KeyboardInterrupt

    with handled_signals(handle):
        try:
            yield caught
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            raise SystemExit(128 + (caught.number or signal.SIGINT)) from None


# ---- what is printed


def _say(console: Console, text: str) -> None:
    """A line of text as it is: paths may hold what rich takes for markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_plan(plan: Plan, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "", "why"):
        table.add_column(column, overflow="fold")
    styles = {"run": "yellow", "cached": "cyan", "skipped": "dim"}
    for node_id, decision in plan.items():
        stored = decision.generation.id if decision.generation is not None else ""
        why = "; ".join(decision.reasons) or stored
        table.add_row(Text(node_id), Text(decision.action, styles[decision.action]), Text(why))
    console.print(table)


def print_report(report: Generation | None, root: Path, console: Console) -> None:
    if report is None:
        console.print(f"no report is stored below {root}", highlight=False, markup=False, soft_wrap=True)
        return
    columns, rows = terminal_rows(json.loads((report.path / "report.json").read_text(encoding="utf-8")))
    table = Table(header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"report: {report.path / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def print_where_to_look(report: Generation | None, root: Path, uri: str, run_id: str, console: Console) -> None:
    where = f"lazypipe ui --root {root}" if uri.startswith("sqlite:") else uri
    console.print(f"MLflow: {where}   (run {run_id})", highlight=False, markup=False, soft_wrap=True)
    if report is not None:
        console.print("rerun one stage: lazypipe run CONFIG --force evaluate/VARIANT", highlight=False)


def print_failures(outcomes: dict[str, Outcome], console: Console) -> int:
    """Print the root causes; 2 when the user can fix all of them, else 1."""
    failed = {i: o for i, o in outcomes.items() if o.state == "failed"}
    for node_id, outcome in failed.items():
        if isinstance(outcome.error, UserError):
            text = f"error: {node_id}: {outcome.error}"
        else:
            tail = "\n".join(outcome.traceback.rstrip().splitlines()[-12:])
            text = f"{tail}\nerror: {node_id} failed: {type(outcome.error).__name__}: {outcome.error}"
        print(text, file=sys.stderr, flush=True)
    blocked = [i for i, o in outcomes.items() if o.state == "blocked"]
    if blocked:
        console.print(f"blocked: {', '.join(blocked)}", highlight=False, markup=False, soft_wrap=True)
    return USER_ERROR if all(isinstance(o.error, UserError) for o in failed.values()) else FAILED
