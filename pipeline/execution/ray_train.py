"""Ray Train around a stage: any number of workers, restarted from the last checkpoint when one dies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lazypipe.pipeline.execution.execute import MapFunction, StageTask
from lazypipe.pipeline.experiment.resources import WorkerResources
from lazypipe.stages.attempts import end_attempt, ends_noted
from lazypipe.stages.config import StageConfig
from lazypipe.stages.contract import (
    Artifact,
    Context,
    DivergedError,
    Interrupted,
    Outputs,
    UserError,
    first_line,
    write_atomically,
)
from lazypipe.stages.facts import Facts
from lazypipe.stages.registry import stage_row
from lazypipe.stages.stage_row import load_function

RESULT = "result.json"
# A restart of the group would change nothing about these: the workers end normally and say which it was.
ENDS = {end.__name__: end for end in (Interrupted, DivergedError, UserError)}


def run_on_workers(
    task: StageTask,
    config: StageConfig,
    inputs: Mapping[str, Artifact],
    map_function: MapFunction,  # noqa: ARG001  (training spreads over workers, not over a map)
) -> Outputs[Facts]:
    """Run a stage data-parallel with TorchTrainer; the stage's own checkpoints, not Ray's, carry a restart."""
    # Each report or restart waits for the controller's poll: 2 s by default, a visible share of short runs.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

    class SayWhy(UserCallback):  # type: ignore[misc]
        """On the controller, which learns of deaths that no worker lives to report."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
            end_attempt(scratch, _cause(worker_exceptions))

    resources = WorkerResources.model_validate(task.resources)
    scratch = task.entry / "scratch"
    (scratch / RESULT).unlink(missing_ok=True)
    # Ray Train silently resumes what it finds under an equal name; a dead attempt may have left it here.
    shutil.rmtree(scratch / "ray_train", ignore_errors=True)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "stage": task.stage,
            "config": config.model_dump(mode="json"),
            "inputs": {name: (str(artifact.path), dict(artifact.manifest)) for name, artifact in inputs.items()},
            "output_dir": str(task.entry / task.generation),
            "scratch_dir": str(scratch),
            "threads": task.threads,
        },
        scaling_config=ScalingConfig(
            num_workers=resources.workers if isinstance(resources.workers, int) else resources.worker_range,
            elastic_resize_monitor_interval_s=resources.resize_interval_s,
            placement_strategy=resources.placement,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={"CPU": resources.cpus_per_worker}
            | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            name=f"{task.fingerprint[:12]}-{task.generation}",
            storage_path=str(scratch / "ray_train"),
            failure_config=FailureConfig(max_failures=resources.max_failures, controller_failure_limit=3),
            callbacks=[SayWhy()],
        ),
    )
    with Context(task.entry / task.generation, scratch, process="trainer").routed_warnings():
        trainer.fit()
    result = json.loads((scratch / RESULT).read_text(encoding="utf-8"))
    if result["ended"] is not None:
        raise ENDS[result["ended"]](result["message"])
    return Outputs(metrics=result["metrics"], facts=stage_row(task.stage).facts.from_json(result["facts"]))


def _cause(worker_exceptions: Mapping[int, BaseException]) -> str:
    """The workers' ends in one line, dead ones first: the others only lost the connection to them."""
    # Of a worker that does not answer Ray Train says that a health check failed; why is in the error below it.
    reasons = {rank: getattr(error, "health_check_failure", error) for rank, error in sorted(worker_exceptions.items())}
    ends = [f"worker {rank}: {first_line(reason)}" for rank, reason in reasons.items()]
    return "; ".join(sorted(ends, key=lambda text: "died" not in text and "dead" not in text))


def _worker(loop_config: dict[str, Any]) -> None:
    """One worker: the same stage function, with its rank."""
    import ray.train
    import ray.train.torch
    import torch

    row = stage_row(loop_config["stage"])
    config = row.config.model_validate(loop_config["config"])
    torch.set_num_threads(loop_config["threads"])
    if row.prepare_worker is not None:
        load_function(row.prepare_worker)(config)  # before CUDA is used, as the next lines do
    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())  # workers of one node see each other's GPUs
    train_context = ray.train.get_context()
    rank = train_context.get_world_rank()
    scratch = Path(loop_config["scratch_dir"])
    context = Context(Path(loop_config["output_dir"]), scratch, rank, train_context.get_world_size())
    inputs = {name: Artifact(Path(path), manifest) for name, (path, manifest) in loop_config["inputs"].items()}
    result: dict[str, Any]
    try:
        with context.routed_warnings(), ends_noted(scratch) if rank == 0 else nullcontext():
            outputs = row.load()(config, inputs, context)
        result = {"ended": None, "metrics": outputs.metrics, "facts": outputs.facts.to_json()}
    except tuple(ENDS.values()) as end:
        result = {"ended": type(end).__name__, "message": str(end)}
    if rank == 0:
        write_atomically(scratch / RESULT, json.dumps(result))
