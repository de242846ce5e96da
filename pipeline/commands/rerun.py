"""An experiment taken from the MLflow run it was logged to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from lazypipe.pipeline.experiment.document import EXPERIMENT_FILE, read_document
from lazypipe.pipeline.tracking.uri import first_touch
from lazypipe.stages.contract import UserError


def experiment_of_run(uri: str, run_id: str) -> tuple[dict[str, Any], str | None, Path]:
    """(experiment document, node id of a stage's run or None, root) of an MLflow run; unknown ids are refused."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.exists():
        raise UserError(
            f"rerun {run_id}: nothing was ever logged to {uri}; name the root of the run with --root, or set "
            "MLFLOW_TRACKING_URI"
        )
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with first_touch(uri, database.parent):
        client = MlflowClient(tracking_uri=uri)
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise UserError(
            f"rerun {run_id}: the tracking server at {uri} knows no such run ({error.message.splitlines()[0]}); "
            "take the id from the MLflow UI or `lazypipe status`, and check MLFLOW_TRACKING_URI and --root"
        ) from error
    tags = run.data.tags
    kind = tags.get("lazypipe.kind")
    parent_id = run_id if kind == "experiment" else tags.get("mlflow.parentRunId")
    if kind not in ("experiment", "stage") or parent_id is None:
        raise UserError(f"rerun {run_id}: this MLflow run was not logged by lazypipe")
    node_id = None
    if kind == "stage":
        node_id = "/".join(part for part in (tags["lazypipe.stage"], tags.get("lazypipe.variant", "")) if part)
    root = Path(client.get_run(parent_id).data.tags["lazypipe.root"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(parent_id, EXPERIMENT_FILE, folder)
        except (MlflowException, OSError) as error:
            raise UserError(f"rerun {run_id}: its run {parent_id} holds no {EXPERIMENT_FILE} ({error})") from error
        return read_document(Path(path)), node_id, root
