"""What travels to the cluster with a job: our four packages, the experiment as one document, and a start script.

    working_dir/  pipeline/ stages/ model/ kernels/   the submitter's code: what was edited here is what runs there
                  experiment.yaml                     extends and overrides applied, paths absolute
                  code_version.json                   commit and dirty diff of the submitter's checkout
                  job.sh                              finds the cluster's interpreter

Some hundred kilobytes. Data, outputs, tests and tokens never travel; what the packages depend on (torch, mlflow, ...)
is installed on the cluster. Ray puts the directory on PYTHONPATH of the driver and of every worker of the job, in front
of a copy that may be installed there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.code_version import PROJECT, write_code_version
from pipeline.document import dump_yaml
from pipeline.experiment import Experiment

PACKAGES = ("pipeline", "stages", "model", "kernels")
SHIPPED_PATTERNS = ("*.py", "*.j2", "*.json")
EXPERIMENT_FILE = "experiment.yaml"
START_SCRIPT_FILE = "job.sh"
# PATH's python need not be the cluster's (a cluster started from a virtual environment by its absolute path), and a
# job is told of no other. Ray starts this shell from a worker, and that worker's parent, the raylet, was told which
# interpreter its workers run on; /proc/PID/exe would give the interpreter below the virtual environment instead.
START_SCRIPT = r"""# Runs `lazypipe run "$@"` with the interpreter that Ray's workers run on.
raylet=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$PPID/status")
python=$(tr '\0' '\n' <"/proc/$raylet/cmdline" |
  sed -n -e 's/^--python_worker_command="\([^"]*\)" .*/\1/p' -e 's/^--python_worker_command=\([^" ]*\) .*/\1/p')
if [ ! -x "$python" ]; then
  echo "job.sh: the cluster's interpreter was not found (raylet $raylet); trying python3 of PATH" >&2
  python=python3
fi
echo "interpreter: $python"
exec "$python" -m pipeline run "$@"
"""


def write_job_package(experiment: Experiment, directory: Path) -> None:
    """Fill an empty directory with everything a job of this experiment needs."""
    for package in PACKAGES:
        for pattern in SHIPPED_PATTERNS:
            for path in sorted((PROJECT / package).rglob(pattern)):
                target = directory / path.relative_to(PROJECT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    dump_yaml(experiment.document, directory / EXPERIMENT_FILE)
    write_code_version(directory)
    (directory / START_SCRIPT_FILE).write_text(START_SCRIPT, encoding="utf-8")
