"""MLflow: a parent run per experiment, a child run per executed stage; cached stages are linked, never faked.

Only the driver talks to MLflow. A stage writes metrics.jsonl; the driver tails it and logs in batches (a sqlite commit
per batch instead of 18 ms per metric), so one client touches the database, a dead server costs no training step, and a
resumed run skips the steps that were logged before it was killed.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lazypipe.pipeline.experiment.document import EXPERIMENT_FILE, dump_yaml
from lazypipe.pipeline.experiment.schema import Experiment
from lazypipe.pipeline.planning.code_version import CodeVersion, code_version
from lazypipe.pipeline.planning.plan import Node, Plan, corpus_of
from lazypipe.pipeline.store.lease import Holder, is_alive
from lazypipe.pipeline.store.store import Generation
from lazypipe.pipeline.tracking.child_run import ChildRun, log_what_is_new, logged_so_far
from lazypipe.pipeline.tracking.system_metrics import watch_machine
from lazypipe.pipeline.tracking.upload import (
    flat_facts,
    log_attempts,
    log_dataset,
    log_files,
    log_model,
    log_params,
    log_points,
    log_task_table,
)
from lazypipe.pipeline.tracking.uri import first_touch
from lazypipe.stages.config import flatten
from lazypipe.stages.contract import METRICS_FILE
from lazypipe.stages.facts import Attempt

LAST_WORDS_S = 10.0  # `lazypipe submit` lets a stopped job live for 30 s, 15 of which its stages may take


class Tracker:
    """One pipeline execution in MLflow. Tracking errors after the start are reported and retried, never fatal."""

    def __init__(self, uri: str, root: Path, experiment: Experiment, me: Holder):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # A server that goes away costs one retry per batch, not mlflow's minutes of them: the next batch tries again.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the run's own last lines say it
        import mlflow
        from mlflow import MlflowClient

        logging.getLogger("mlflow.store.db.utils").setLevel(
            logging.WARNING
        )  # "Creating initial MLflow database tables"
        self.uri = uri
        self.experiment = experiment
        self._root = root
        self._me = me
        self._troubled = False
        self._unsaid: list[Callable[[], object]] = []
        self._pipeline = ""
        with first_touch(uri, root):  # the client itself creates or migrates the schema
            mlflow.set_tracking_uri(uri)
            self.client = MlflowClient(tracking_uri=uri)
            self.experiment_id = self._experiment_id()
        self.parent_id = ""

    def _experiment_id(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment.name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        location = str(self._root / "artifacts") if self.uri.startswith("sqlite:") else None
        tags = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on training runs, not on traces
        return str(self.client.create_experiment(self.experiment.name, artifact_location=location, tags=tags))

    # ---- the parent run

    def start(self, plan: Plan, pipeline: str, command: str, rerun_of: str | None) -> None:
        """Open the parent run: the one an interrupted execution of the same pipeline left behind, else a new one."""
        from mlflow.entities import RunTag

        code = code_version()
        self._pipeline = pipeline
        tags = {
            "lazypipe.kind": "experiment",
            "lazypipe.pipeline": pipeline,
            "lazypipe.owner": json.dumps(self._me.__dict__),
            "lazypipe.command": command,
            "lazypipe.root": str(self._root),
            "mlflow.source.name": "lazypipe",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": getpass.getuser(),
            **_code_tags(code),
        }
        if rerun_of is not None:
            tags["lazypipe.rerun_of"] = rerun_of
        interrupted = self._interrupted_parent(pipeline) if rerun_of is None else None
        if interrupted is not None:
            self.parent_id = interrupted
            self.client.update_run(interrupted, status="RUNNING")
            self.client.log_batch(interrupted, tags=[RunTag(key, value) for key, value in tags.items()])
        else:
            run = self.client.create_run(self.experiment_id, tags=tags, run_name=self.experiment.name)
            self.parent_id = run.info.run_id
            log_params(self.client, self.parent_id, flatten(self.experiment.document))
        self._log_documents(plan, code)
        for decision in plan.values():
            if decision.action == "cached" and decision.generation is not None:
                self.link(decision.node, decision.generation)
        corpus = corpus_of(plan)
        if corpus is not None and corpus.action == "cached" and corpus.generation is not None:
            self.log_corpus(self.parent_id, corpus.generation, "training")

    def _interrupted_parent(self, pipeline: str) -> str | None:
        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.`lazypipe.pipeline` = '{pipeline}' and tags.`lazypipe.kind` = 'experiment'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        if not runs or runs[0].info.status not in ("RUNNING", "KILLED"):
            return None
        if runs[0].info.status == "RUNNING" and not _owner_is_dead(runs[0].data.tags):
            return None
        return str(runs[0].info.run_id)

    def _log_documents(self, plan: Plan, code: CodeVersion) -> None:
        folder = self._root / "runs" / self.parent_id
        folder.mkdir(parents=True, exist_ok=True)
        dump_yaml(self.experiment.document, folder / EXPERIMENT_FILE)
        decisions = {
            node_id: {"action": d.action, "reasons": d.reasons, "fingerprint": d.node.fingerprint}
            for node_id, d in plan.items()
        }
        (folder / "plan.json").write_text(json.dumps(decisions, indent=1) + "\n", encoding="utf-8")
        if code.diff:
            (folder / "git.diff").write_text(code.diff, encoding="utf-8")
        for file in sorted(folder.iterdir()):
            self.client.log_artifact(self.parent_id, str(file))

    def link(self, node: Node, generation: Generation) -> None:
        """Point from the parent run to the run that computed a cached stage.

        A driver killed between a commit and its last words to MLflow leaves that run open: it is completed here.
        """
        tracking = generation.manifest.get("tracking", {})
        run_id = tracking.get("run_id", "")
        target = f"{generation.id} (run {run_id})" if run_id else generation.id

        def connect() -> None:
            self.client.set_tag(self.parent_id, f"lazypipe.cached.{node.id}", target)
            if run_id and tracking.get("uri") == self.uri and self._abandoned(run_id):
                self.finish_child(logged_so_far(self.client, run_id, generation.path / METRICS_FILE), node, generation)

        self._safely(connect)

    def _abandoned(self, run_id: str) -> bool:
        """Whether a stage's run is still open although nobody is executing it."""
        run = self.client.get_run(run_id)
        parent_id = run.data.tags.get("mlflow.parentRunId", "")
        if run.info.status != "RUNNING" or run.info.lifecycle_stage != "active":
            return False
        return parent_id == self.parent_id or _owner_is_dead(self.client.get_run(parent_id).data.tags)

    def finish(self, status: str, report: Generation | None) -> None:
        """Close the parent run; a report's numbers, page and figures are logged on it."""

        def close() -> None:
            if report is not None:
                log_points(self.client, self.parent_id, report.manifest["metrics"], step=0)
                for name in report.manifest["files"]:
                    folder = Path(name).parent.as_posix()
                    self.client.log_artifact(self.parent_id, str(report.path / name), None if folder == "." else folder)
            self.client.set_terminated(self.parent_id, status=status)

        self._end(close)
        deadline = time.monotonic() + LAST_WORDS_S
        while self._unsaid and time.monotonic() < deadline:
            time.sleep(0.5)
            self._unsaid = [words for words in self._unsaid if not self._safely(words)]

    # ---- a stage's run

    def open_child(
        self, node: Node, scratch: Path, output_dir: Path, leftovers: Sequence[Path], rerun_of: str | None
    ) -> ChildRun:
        """Create the stage's run, or take up the one its interrupted execution logged to.

        `leftovers` are half-written generations: a killed driver may not have logged all they report. When
        the server does not answer, the stage runs all the same, with a ChildRun without an id that logs nothing.
        """
        child = ChildRun("", output_dir / METRICS_FILE)

        def create() -> None:
            nonlocal child
            child = self._open_child(node, scratch, output_dir, leftovers, rerun_of)

        def watch() -> None:
            child.monitor = watch_machine(child.run_id, self.uri)

        if not self._safely(create):
            print(f"warning: {node.id} runs without an MLflow run; its metrics stay in the store", file=sys.stderr)
        elif node.row.watch_machine:
            self._safely(watch)
        return child

    def _open_child(
        self, node: Node, scratch: Path, output_dir: Path, leftovers: Sequence[Path], rerun_of: str | None
    ) -> ChildRun:
        attempt = scratch / "attempt.json"  # an execution by the pipeline; training may restart within one
        tags = {
            "mlflow.parentRunId": self.parent_id,
            "lazypipe.kind": "stage",
            "lazypipe.stage": node.stage,
            "lazypipe.variant": node.variant or "",
            "lazypipe.fingerprint": node.fingerprint,
            "lazypipe.generation": f"{node.stage}/{node.fingerprint[:12]}/{output_dir.name}",
            "lazypipe.pipeline": self._pipeline,
            "mlflow.source.name": "lazypipe",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": getpass.getuser(),
            **_code_tags(code_version()),
        }
        if rerun_of is not None:
            tags["lazypipe.rerun_of"] = rerun_of
        child = self._resume_child(attempt, tags, leftovers)
        if child is not None:
            child.metrics_file, child.offset = output_dir / METRICS_FILE, 0
        else:
            run = self.client.create_run(self.experiment_id, tags=tags, run_name=node.id)
            child = ChildRun(run.info.run_id, output_dir / METRICS_FILE)
            params = flatten(node.config.model_dump(mode="json"))
            params |= {"stage": node.stage, "experiment": self.experiment.name}
            if node.variant is not None:
                params["variant"] = node.variant
            log_params(self.client, child.run_id, params)
        child.scratch = scratch
        attempt.write_text(json.dumps({"run_id": child.run_id, "uri": self.uri}), encoding="utf-8")
        return child

    def _resume_child(self, attempt: Path, tags: Mapping[str, str], leftovers: Sequence[Path]) -> ChildRun | None:
        """The run of the interrupted execution, caught up with what that execution reported, or None."""
        from mlflow.entities import RunTag
        from mlflow.exceptions import MlflowException

        try:
            before = json.loads(attempt.read_text(encoding="utf-8"))
            if before["uri"] != self.uri:
                return None
            run = self.client.get_run(before["run_id"])
        except (OSError, ValueError, KeyError, MlflowException):
            return None
        resumable = any((attempt.parent / "checkpoints").glob("step-*"))
        if run.info.lifecycle_stage != "active" or (run.info.status == "FAILED" and not resumable):
            return None
        run_id = run.info.run_id
        self.client.update_run(run_id, status="RUNNING")
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        child = logged_so_far(self.client, run_id, attempt)
        for directory in leftovers:
            child.metrics_file, child.offset = directory / METRICS_FILE, 0
            self.pump(child)
        return child

    def pump(self, child: ChildRun) -> None:
        """Log what the stage has reported since the last time."""
        if child.run_id:
            self._safely(lambda: log_what_is_new(self.client, child))

    def finish_child(self, child: ChildRun, node: Node, generation: Generation) -> None:
        """Log what a finished stage left: final numbers, corpus, figures, tables, small files, its checkpoint."""

        def close() -> None:
            final = {k: v for k, v in generation.manifest["metrics"].items() if k not in child.streamed}
            log_points(self.client, child.run_id, final, step=max(child.last_step, 0))
            attempts = generation.manifest["facts"].get("attempts", ())
            log_attempts(self.client, child.run_id, [Attempt.from_json(attempt) for attempt in attempts])
            for key, value in flat_facts(generation.manifest["facts"]).items():
                self.client.set_tag(child.run_id, f"fact.{key}", value)
            self.client.set_tag(child.run_id, "lazypipe.path", str(generation.path))
            log_files(self.client, child.run_id, generation)
            log_task_table(self.client, child.run_id, generation)
            self.client.set_terminated(child.run_id, status="FINISHED")

        child.stop_monitor()
        if child.run_id:
            self.pump(child)
            self._end(close)
            self._safely(lambda: log_model(self.client, self.experiment_id, child.run_id, node, generation))

    def log_corpus(self, run_id: str, corpus: Generation, context: str) -> None:
        """Attach the tokenized corpus to a run as an MLflow dataset. context: training, evaluation or tokenized."""
        if run_id:
            self._safely(lambda: log_dataset(self.client, run_id, corpus, context))

    def fail_child(self, child: ChildRun, status: str, error: str) -> None:
        """Say how a stage ended before logging what it left: whoever stopped the driver may not wait for that."""

        def close() -> None:
            self.client.set_terminated(child.run_id, status=status)
            if error:
                self.client.set_tag(child.run_id, "lazypipe.error", error[:4000])
                self.client.log_text(child.run_id, error, "error.txt")

        if child.run_id:
            self._end(close)
        child.stop_monitor()
        self.pump(child)

    # ---- what the methods above share

    def _end(self, close: Callable[[], object]) -> None:
        """Close a run; what the server does not take now is said again when the parent run ends."""
        if not self._safely(close):
            self._unsaid.append(close)

    def _safely(self, action: Callable[[], object]) -> bool:
        """Tracking is a by-product of hours of compute: an error is said once and retried with the next batch."""
        from mlflow.exceptions import MlflowException

        try:
            action()
        except (MlflowException, OSError) as error:
            if not self._troubled:
                print(f"warning: MLflow at {self.uri}: {error}; going on, will retry", file=sys.stderr, flush=True)
            self._troubled = True
            return False
        self._troubled = False
        return True


def _owner_is_dead(tags: Mapping[str, str]) -> bool:
    try:
        return is_alive(Holder(**json.loads(tags["lazypipe.owner"]))) is False
    except (KeyError, ValueError, TypeError):
        return False


def _code_tags(code: CodeVersion) -> dict[str, str]:
    tags = {"lazypipe.sources": code.sources[:32]}
    if code.commit is not None:
        tags |= {"mlflow.source.git.commit": code.commit, "lazypipe.git.dirty": str(code.dirty).lower()}
    return tags
