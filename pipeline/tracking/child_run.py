"""A stage's MLflow run while the stage writes metrics.jsonl: what was logged of it, and what is new."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lazypipe.pipeline.tracking.system_metrics import PREFIX
from lazypipe.pipeline.tracking.upload import log_attempts
from lazypipe.stages.attempts import read_attempts

if TYPE_CHECKING:  # mlflow takes seconds to import; a cached run never needs it
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

POINTS_AT_ONCE = 1000  # what MLflow takes in a batch


@dataclass
class ChildRun:
    """run_id is "" for a stage that MLflow did not take: it logs nothing. offset: bytes of metrics_file that are
    logged; last_step, streamed: of them, and of earlier executions. attempts: of those in scratch, how many are tags.
    """

    run_id: str
    metrics_file: Path
    offset: int = 0
    last_step: int = -1
    streamed: set[str] = field(default_factory=set)
    scratch: Path | None = None  # where training notes its attempts
    attempts: int = 0
    monitor: SystemMetricsMonitor | None = None

    def stop_monitor(self) -> None:
        if self.monitor is not None:
            self.monitor.finish()
        self.monitor = None


def logged_so_far(client: MlflowClient, run_id: str, metrics_file: Path) -> ChildRun:
    """A run as it is on the server: its last step, and the metrics it has. The monitor counts steps of its own."""
    names = {name for name in client.get_run(run_id).data.metrics if not name.startswith(PREFIX)}
    steps = [point.step for name in names for point in client.get_metric_history(run_id, name)]
    return ChildRun(run_id, metrics_file, last_step=max(steps, default=-1), streamed=names)


def log_what_is_new(client: MlflowClient, child: ChildRun) -> None:
    """Log attempts, and the complete lines of metrics.jsonl, that were not logged yet."""
    if child.scratch is not None:
        attempts = read_attempts(child.scratch)
        log_attempts(client, child.run_id, attempts[child.attempts :])
        child.attempts = max(child.attempts, len(attempts))
    try:
        with child.metrics_file.open("rb") as file:
            file.seek(child.offset)
            data = file.read()
    except FileNotFoundError:
        return
    complete = data[: data.rfind(b"\n") + 1]
    _log_lines(client, child, complete)
    child.offset += len(complete)


def _log_lines(client: MlflowClient, child: ChildRun, lines: bytes) -> None:
    from mlflow.entities import Metric

    points, last = [], child.last_step
    for line in lines.splitlines():
        entry = json.loads(line)
        step = int(entry["step"])
        if step <= child.last_step:
            continue
        last = max(last, step)
        child.streamed.update(entry["metrics"])
        stamp = int(entry["time"] * 1000)
        points += [Metric(name, value, stamp, step) for name, value in entry["metrics"].items()]
    for start in range(0, len(points), POINTS_AT_ONCE):
        client.log_batch(child.run_id, metrics=points[start : start + POINTS_AT_ONCE])
    child.last_step = last
