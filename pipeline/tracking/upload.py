"""What a finished stage leaves in MLflow: numbers, parameters, small files, its checkpoint as a LoggedModel."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazypipe.pipeline.planning.plan import Node
from lazypipe.pipeline.store.store import MANIFEST, Generation
from lazypipe.stages.config import flatten
from lazypipe.stages.facts import Attempt, TokenizeFacts

if TYPE_CHECKING:  # mlflow takes seconds to import; a cached run never needs it
    from mlflow import MlflowClient

MAX_ARTIFACT_BYTES = 64 * 2**20  # larger files stay in the store and are linked by path
# Token shards are data, not results; weights go into the LoggedModel.
LINKED_SUFFIXES = (".arrow", ".safetensors")
LOGGED_TABLES = "mlflow.loggedArtifacts"  # the tag MLflow lists a run's tables in; logging one again would append to it


def log_files(client: MlflowClient, run_id: str, generation: Generation) -> None:
    """Figures, tables, pages and the manifest; what is large or linked stays in the store."""
    for name, entry in [*generation.manifest["files"].items(), (MANIFEST, {"size": 0})]:
        if name.endswith(LINKED_SUFFIXES) or entry["size"] > MAX_ARTIFACT_BYTES:
            continue
        folder = Path(name).parent.as_posix()
        client.log_artifact(run_id, str(generation.path / name), None if folder == "." else folder)


def log_task_table(client: MlflowClient, run_id: str, generation: Generation) -> None:
    """tables/tasks of an evaluation as an MLflow table, which the UI shows and compares across runs; once per run."""
    rows = generation.path / "tables" / "tasks.json"
    if not rows.is_file() or LOGGED_TABLES in client.get_run(run_id).data.tags:
        return
    found = json.loads(rows.read_text(encoding="utf-8"))
    client.log_table(run_id, {name: [row[name] for row in found] for name in found[0]}, "tasks.json")


def log_model(client: MlflowClient, experiment_id: str, run_id: str, node: Node, generation: Generation) -> None:
    """The model of a stage that makes one becomes a LoggedModel with its safetensors checkpoint, if small enough."""
    checkpoint = generation.path / "checkpoint"
    making = node.row.models
    if making is None or sum(p.stat().st_size for p in checkpoint.rglob("*")) > MAX_ARTIFACT_BYTES:
        return
    model = client.create_logged_model(
        experiment_id,
        name=str(node.variant),
        source_run_id=run_id,
        tags={"lazypipe.fingerprint": node.fingerprint},
        params={"mixer": making.model(node.config).mixer},
    )
    client.log_model_artifacts(model.model_id, str(checkpoint))
    client.finalize_logged_model(model.model_id, "READY")


def log_points(client: MlflowClient, run_id: str, metrics: Mapping[str, float], step: int) -> None:
    """One point per metric, in batches of what MLflow takes at once."""
    from mlflow.entities import Metric

    stamp = int(time.time() * 1000)
    points = [Metric(name, float(value), stamp, step) for name, value in metrics.items()]
    for start in range(0, len(points), 1000):
        client.log_batch(run_id, metrics=points[start : start + 1000])


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    entries = [Param(name, str(value)[:6000]) for name, value in params.items()]
    for start in range(0, len(entries), 100):
        client.log_batch(run_id, params=entries[start : start + 100])


def log_dataset(client: MlflowClient, run_id: str, corpus: Generation, context: str) -> None:
    """A tokenized corpus as an MLflow dataset; its digest is the first 32 of its fingerprint."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = TokenizeFacts.read(corpus.manifest).source.kind
    dataset = Dataset(
        name=f"{kind}-corpus",
        digest=corpus.fingerprint[:32],
        source_type="local",
        source=json.dumps({"kind": kind, "path": str(corpus.path)}),
        profile=json.dumps(corpus.manifest["metrics"], sort_keys=True),
    )
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])])


def log_attempts(client: MlflowClient, run_id: str, attempts: Sequence[Attempt]) -> None:
    """Tags of a training run: how many attempts it has taken, and of each where it began and what ended the last."""
    for one in attempts:
        began = f"from step {one.from_step} on {one.workers} workers at {one.started}"
        text = began if one.cause is None else f"{began}; before: {one.cause}"
        client.set_tag(run_id, f"lazypipe.attempt.{one.attempt}", text)
    if attempts:
        client.set_tag(run_id, "lazypipe.attempts", str(attempts[-1].attempt))


def flat_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """Scalar facts as tag values, at most 500 characters each."""
    flat = flatten(facts)
    return {key: str(value)[:500] for key, value in flat.items() if not isinstance(value, (list, tuple, dict))}
