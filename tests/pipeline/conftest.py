"""One real run of a tiny experiment (Ray, MLflow on sqlite) that several tests look at."""

from __future__ import annotations

import fcntl
import os

import pytest

from tests.pipeline.tiny import FinishedRun, lazypipe, write_experiment

USERS_FILES = ("kernels.py", "model.py", "pipeline.py", "stages.py", "lazypipe/__init__.py")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """`lazypipe run tiny.yaml` on its own Ray cluster, ended with exit code 0; one for all of pytest's workers.

    It runs in a folder with files of the user's that bear the names of ours; each leaves a mark when it is imported.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished_run"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = folder / "stdout.txt"
        config = folder / "tiny.yaml"
        if not said.exists():
            (folder / "lazypipe").mkdir(exist_ok=True)
            for name in USERS_FILES:
                (folder / name).write_text("open(__file__ + '.imported', 'w')\nclass GPT: pass\n", encoding="utf-8")
            result = lazypipe("run", write_experiment(folder), folder=folder)
            assert result.returncode == 0, result.stdout + result.stderr
            said.write_text(result.stdout, encoding="utf-8")
    return FinishedRun(config, folder / "output", said.read_text(encoding="utf-8"))
