"""What travels to the cluster with a job: our package, the experiment as one document, and a start script.

    working_dir/  lazypipe/                           the submitter's code: what was edited here is what runs there
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

from lazypipe.pipeline.experiment.document import EXPERIMENT_FILE, dump_yaml
from lazypipe.pipeline.experiment.schema import Experiment
from lazypipe.pipeline.planning.code_version import PACKAGE, write_code_version

PACKAGES = ("pipeline", "stages", "model", "kernels")
SHIPPED_PATTERNS = ("*.py", "*.j2", "*.json")
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
exec "$python" -m lazypipe run "$@"
"""


def write_job_package(experiment: Experiment, directory: Path) -> None:
    """Fill an empty directory with everything a job of this experiment needs."""
    for folder in (PACKAGE, *(PACKAGE / name for name in PACKAGES)):  # by name: rglob does not follow links
        for pattern in SHIPPED_PATTERNS:
            for path in sorted(folder.glob(pattern) if folder == PACKAGE else folder.rglob(pattern)):
                target = directory / "lazypipe" / path.relative_to(PACKAGE)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    dump_yaml(experiment.document, directory / EXPERIMENT_FILE)
    write_code_version(directory)
    (directory / START_SCRIPT_FILE).write_text(START_SCRIPT, encoding="utf-8")
