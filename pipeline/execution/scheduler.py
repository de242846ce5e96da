"""Walking the DAG: start what is ready and fits, commit what ends, keep siblings going when a branch fails.

A node is ready when all its inputs are done or cached. It starts when its resources are free (admission against the
cluster's totals, so that fifteen variants do not all claim two cores) and when the lease of its recipe is ours.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lazypipe.pipeline.execution.backends import Backend, Demand, Finished, demand_of
from lazypipe.pipeline.execution.execute import LeaseLostError, StageTask
from lazypipe.pipeline.execution.progress import Display
from lazypipe.pipeline.experiment.schema import Experiment
from lazypipe.pipeline.planning.code_version import PACKAGE
from lazypipe.pipeline.planning.plan import FORCED, Decision, Plan, corpus_of, was_forced
from lazypipe.pipeline.planning.preflight import check_lengths
from lazypipe.pipeline.planning.stage_sources import SyntaxTrees, stage_digest
from lazypipe.pipeline.store.lease import Heartbeat, Holder, acquire, held_by, release
from lazypipe.pipeline.store.store import MANIFEST, Generation, Store, read_generation
from lazypipe.pipeline.tracking.child_run import ChildRun
from lazypipe.pipeline.tracking.tracker import Tracker
from lazypipe.stages.contract import PROGRESS_FILE, Interrupted, UserError, first_line
from lazypipe.stages.warning_lines import read_warnings, warning_text

POLL_S = 0.25
PUMP_S = 1.0
GRACE_S = 15.0

State = Literal["waiting", "running", "done", "cached", "skipped", "failed", "blocked", "killed"]


@dataclass
class Outcome:
    """How a node ended."""

    state: State
    generation: Generation | None = None
    error: BaseException | None = None
    traceback: str = ""


@dataclass
class Running:
    decision: Decision
    demand: Demand
    child: ChildRun
    directory: Path
    output_dir: Path
    warned: set[tuple[str, int | None]] = field(default_factory=set)  # (message, step) of warnings on the screen


@dataclass
class Walk:
    """The state of one walk over a plan."""

    plan: Plan
    store: Store
    experiment: Experiment
    backend: Backend
    tracker: Tracker
    display: Display
    me: Holder
    wait: bool = True
    rerun_of: str | None = None
    stop_signal: Callable[[], int | None] = lambda: None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    _trees: SyntaxTrees = field(init=False)
    _heartbeat: Heartbeat = field(default_factory=Heartbeat)
    _announced: set[str] = field(default_factory=set)
    _pump_lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._trees = SyntaxTrees(self.store.root / "cache")

    def run(self) -> dict[str, Outcome]:
        """Walk until every node has ended. Returns the outcomes by node id."""
        for node_id, decision in self.plan.items():
            if decision.action == "run":
                self.outcomes[node_id] = Outcome("waiting")
            else:
                self.outcomes[node_id] = Outcome(decision.action, decision.generation)
                self.display.set(node_id, decision.action)
        making = corpus_of(self.plan)
        corpus = None if making is None else self.outcomes[making.node.id].generation
        if corpus is not None:
            check_lengths(self.plan, corpus)
        demands = {d.node.id: demand_of(d.node, self.experiment, self.backend.capacity) for d in self._to_run()}
        finished_pumping = threading.Event()
        pump = threading.Thread(target=self._pump_until, args=(finished_pumping,), daemon=True)
        pump.start()
        try:
            while any(o.state in ("waiting", "running") for o in self.outcomes.values()):
                if self.stop_signal() is not None:
                    self._stop_all()
                    break
                self._block_children_of_failures()
                started = self._start_ready(demands)
                for finished in self.backend.poll(0 if started else POLL_S):
                    self._settle(finished)
        except KeyboardInterrupt:
            self._stop_all()
        except BaseException:
            with suppress(Exception):  # the first error is the one to hear of
                self._stop_all()
            raise
        finally:
            self._trees.save()
            finished_pumping.set()
            pump.join()
            self._heartbeat.stop()
            for running in self.running.values():
                release(running.directory, self.me)
        return self.outcomes

    def _to_run(self) -> list[Decision]:
        return [d for d in self.plan.values() if d.action == "run"]

    # ---- starting

    def _start_ready(self, demands: dict[str, Demand]) -> bool:
        started = False
        for decision in self._to_run():
            node = decision.node
            if self.outcomes[node.id].state != "waiting" or self.stop_signal() is not None:
                continue
            if any(self.outcomes[origin].generation is None for origin in node.inputs.values()):
                continue
            if any(r.decision.node.fingerprint == node.fingerprint for r in self.running.values()):
                continue  # a variant with the same recipe is at it; its result will be used
            demand = demands[node.id]
            free_cpus = self.backend.capacity.cpus - sum(r.demand.cpus for r in self.running.values())
            free_gpus = self.backend.capacity.gpus - sum(r.demand.gpus for r in self.running.values())
            if demand.cpus > free_cpus + 1e-9 or demand.gpus > free_gpus + 1e-9:
                continue
            started |= self._start(decision, demand)
            if started and self.backend.inline:
                break  # it has ended already: settle it before the next
        return started

    def _start(self, decision: Decision, demand: Demand) -> bool:
        node = decision.node
        entry = self.store.entry(node.stage, node.fingerprint)
        holder = acquire(entry.path, self.me)
        if holder is not None:
            if not self.wait:
                held = UserError(f"{holder.describe()} is executing it now; leave --no-wait out to wait for it")
                self.outcomes[node.id] = Outcome("failed", error=held)
                self.display.set(node.id, "failed", str(held))
                return False
            if node.id not in self._announced:
                self._announced.add(node.id)
                self.display.note(f"{node.id}: waiting for {holder.describe()}, which is executing the same recipe")
            return False
        self._heartbeat.add(entry.path)
        inputs = {name: self.outcomes[origin].generation for name, origin in node.inputs.items()}
        used = {name: generation for name, generation in inputs.items() if generation is not None}
        stored = self._made_meanwhile(decision, used)
        if stored is not None:
            self._release(entry.path)
            self.outcomes[node.id] = Outcome("cached", stored)
            self.display.set(node.id, "cached", "made by another run or variant meanwhile")
            self.tracker.link(node, stored)
            return True
        name = entry.next_generation()
        resumes_forced = was_forced(entry)
        scratch = entry.open_scratch({k: g.id for k, g in used.items()}, fresh=decision.forced and not resumes_forced)
        if decision.forced or resumes_forced:
            (scratch / FORCED).touch()
        output_dir = entry.path / name
        child = self.tracker.open_child(node, scratch, output_dir, entry.uncommitted(), self.rerun_of)
        swept = entry.sweep()
        if swept:
            self.display.note(f"warning: {node.id}: removed the half-written generation {', '.join(swept)}")
        for name_of_input, origin in node.inputs.items():
            if self.plan[origin].node.row.corpus is not None and node.row.corpus_role is not None:
                self.tracker.log_corpus(child.run_id, used[name_of_input], node.row.corpus_role)
        resources = self.experiment.resources[node.stage].model_dump(mode="json")
        task = StageTask(
            node_id=node.id,
            stage=node.stage,
            variant=node.variant,
            config=node.config.model_dump(mode="json"),
            identity=node.identity,
            source=node.source,
            fingerprint=node.fingerprint,
            entry=entry.path,
            generation=name,
            lease_token=self.me.token,
            threads=demand.threads,
            experiment=self.experiment.name,
            tracking={"uri": self.tracker.uri, "run_id": child.run_id, "parent_run_id": self.tracker.parent_id},
            resources=resources,
            input_names=tuple(used),
            code_sha256=stage_digest(PACKAGE, node.row.function, self._trees),
        )
        with self._pump_lock:
            self.running[node.id] = Running(decision, demand, child, entry.path, output_dir)
        self.outcomes[node.id].state = "running"
        self.display.begin(node.id, scratch / PROGRESS_FILE)
        try:
            self.backend.submit(task, [str(generation.path) for generation in used.values()], demand)
        except UserError as refusal:
            self._settle(Finished(node.id, None, refusal))
        except BaseException:
            self._drop(node.id)  # it never ran, or ran here and was interrupted
            raise
        return True

    def _made_meanwhile(self, decision: Decision, inputs: dict[str, Generation]) -> Generation | None:
        """A result that appeared between planning and now, made from the inputs we would use."""
        node = decision.node
        if decision.forced and not any(
            o.state == "done" and self.plan[i].node.fingerprint == node.fingerprint for i, o in self.outcomes.items()
        ):
            return None
        entry = self.store.entry(node.stage, node.fingerprint)
        if entry.damage() is not None:
            return None
        generation = entry.current()
        # Damage that only a sha256 showed would pass the quick check again.
        if generation is None or generation.problem(full=decision.damage is not None) is not None:
            return None
        same = all(generation.manifest["inputs"].get(k, {}).get("generation") == g.id for k, g in inputs.items())
        return generation if same else None

    # ---- ending

    def _settle(self, finished: Finished) -> None:
        with self._pump_lock:
            running = self.running.pop(finished.node_id)
        node = running.decision.node
        outcome = self.outcomes[node.id]
        self._show_warnings(running, read_warnings(running.directory / "scratch"))
        if finished.path is not None:
            outcome.state, outcome.generation = "done", read_generation(Path(finished.path))
            self._show_warnings(running, outcome.generation.manifest.get("warnings", ()))  # the scratch is gone
            self.tracker.finish_child(running.child, node, outcome.generation)
            if node.row.corpus is not None:
                self.tracker.log_corpus(running.child.run_id, outcome.generation, node.row.corpus_role or "tokenized")
                self.tracker.log_corpus(self.tracker.parent_id, outcome.generation, "training")
            self.display.set(node.id, "done", _headline(node.row.headline, outcome.generation))
            if node.row.corpus is not None:
                self._release(running.directory)
                check_lengths(self.plan, outcome.generation)
        elif isinstance(finished.error, Interrupted):
            self._killed(running)
        elif isinstance(finished.error, LeaseLostError):
            outcome.state = "waiting"
            self.display.note(f"warning: {finished.error}")
            self.tracker.fail_child(running.child, "KILLED", str(finished.error))
        else:
            outcome.state, outcome.error, outcome.traceback = "failed", finished.error, finished.traceback
            self.tracker.fail_child(running.child, "FAILED", finished.traceback or str(finished.error))
            self._discard_output(running)
            self.display.set(node.id, "failed", first_line(finished.error))
        self._release(running.directory)

    def _killed(self, running: Running) -> None:
        node = running.decision.node
        node_id = node.id
        self.outcomes[node_id].state = "killed"
        self.tracker.fail_child(running.child, "KILLED", "")
        self._discard_output(running)
        resumes = node.row.resumes(node.config)
        self.display.set(node_id, "killed", "resumes with the next run" if resumes else "")

    def _discard_output(self, running: Running) -> None:
        """Remove the uncommitted generation of an execution that ended, when its metrics are logged; its scratch
        (checkpoints) stays.
        """
        if held_by(running.directory, self.me.token) and not (running.output_dir / MANIFEST).exists():
            shutil.rmtree(running.output_dir, ignore_errors=True)

    def _release(self, directory: Path) -> None:
        self._heartbeat.remove(directory)
        release(directory, self.me)

    def _block_children_of_failures(self) -> None:
        for decision in self._to_run():
            node = decision.node
            if self.outcomes[node.id].state != "waiting":
                continue
            ended = [i for i in node.inputs.values() if self.outcomes[i].state not in ("waiting", "running")]
            bad = [i for i in ended if self.outcomes[i].generation is None]
            if bad:
                self.outcomes[node.id].state = "blocked"
                self.display.set(node.id, "blocked", f"needs {', '.join(bad)}")

    def interrupt(self) -> bool:
        """React to a signal: ask stages to save and leave. True when the caller runs a stage that cannot."""
        running = list(self.running.values())
        self._ask_to_stop(running)
        return self.backend.inline and not all(r.decision.node.row.saves_on_stop for r in running)

    def _ask_to_stop(self, running: list[Running]) -> None:
        for one in running:
            if one.decision.node.row.saves_on_stop:
                with suppress(OSError):
                    (one.directory / "scratch" / "stop").touch()

    def _stop_all(self) -> None:
        """Ask stages that can to save and leave, end all others, and mark what was running as killed."""
        self._ask_to_stop(list(self.running.values()))
        for running in list(self.running.values()):
            if not running.decision.node.row.saves_on_stop:
                self.backend.cancel(running.decision.node.id, force=False)
        deadline = time.monotonic() + GRACE_S
        with suppress(KeyboardInterrupt):
            while self.running and not self.backend.inline and time.monotonic() < deadline:
                for one in self.backend.poll(POLL_S):
                    if one.path is not None or isinstance(one.error, Interrupted):
                        self._settle(one)
                    else:
                        self._drop(one.node_id)
        for node_id in list(self.running):
            self.backend.cancel(node_id, force=True)
            self._drop(node_id)

    def _drop(self, node_id: str) -> None:
        with self._pump_lock:
            running = self.running.pop(node_id)
        self._show_warnings(running, read_warnings(running.directory / "scratch"))
        self._killed(running)
        self._release(running.directory)

    # ---- beside the walk

    def _pump_until(self, finished: threading.Event) -> None:
        """Carry warnings and progress to the screen and metrics to MLflow while stages run."""
        while not finished.wait(PUMP_S):
            with self._pump_lock:
                for running in self.running.values():
                    self._show_warnings(running, read_warnings(running.directory / "scratch"))
                for running in self.running.values():
                    self.tracker.pump(running.child)
            self.display.refresh()

    def _show_warnings(self, running: Running, entries: Iterable[Mapping[str, Any]]) -> None:
        """Print the warnings of a stage that were not printed yet."""
        for entry in entries:
            key = (entry["message"], entry["step"])
            if key not in running.warned:
                running.warned.add(key)
                self.display.note(f"warning: {running.decision.node.id}: {warning_text(entry)}")


def _headline(shown: Sequence[str], generation: Generation) -> str:
    metrics = generation.manifest["metrics"]
    text = "  ".join(f"{name}={metrics[name]:,.4g}" for name in shown if name in metrics)
    resumed = generation.manifest.get("resumed_from")
    return f"{text}  resumed from step {resumed}" if resumed else text
