"""One real run of a tiny experiment (Ray, MLflow on sqlite) that several tests look at."""

from __future__ import annotations

import pytest

from tests.pipeline.tiny import FinishedRun, lazypipe, write_experiment


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """`lazypipe run tiny.yaml` on its own Ray cluster, ended with exit code 0."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_experiment(folder)
    result = lazypipe("run", config)
    assert result.returncode == 0, result.stdout + result.stderr
    return FinishedRun(config, folder / "output", result.stdout)
