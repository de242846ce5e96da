"""The benchmarks of an evaluation: each task of the harness on its own, so that nothing depends on the others.

A task is seeded, built, run and aggregated by the harness itself, and its result is kept in scratch_dir/tasks/TASK
(stages/kept_work.py) before the next begins: an interrupted evaluation goes on with the next task, and tasks that other
workers run give the numbers they would give here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lazypipe.model.checkpoint import Checkpoint, load_checkpoint
from lazypipe.stages.contract import Context, Interrupted, file_sha256
from lazypipe.stages.evaluate.benchmarks.suites import expand
from lazypipe.stages.evaluate.benchmarks.tasks import files_of, load_task
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.kept_work import keep, kept, sweep_unfinished, work_key
from lazypipe.stages.model_checks import check_inference_kernels
from lazypipe.stages.random_states import preserved_random_states

TABLE = "tasks"
SAMPLES_FILE = "samples.jsonl"


class TaskScores(NamedTuple):
    """metrics: TASK/METRIC and TASK/METRIC_stderr. counts: by task, what it cost. lm_eval: the harness's version."""

    metrics: dict[str, float]
    counts: dict[str, dict[str, Any]]
    lm_eval: str


@dataclass(frozen=True)
class Share:
    """The tasks one worker runs, each with the key its result is kept by. Picklable."""

    config: EvaluateConfig
    tasks: Mapping[str, str]
    checkpoint: Path
    tokenizer_json: Path
    scratch_dir: Path
    threads: int


def check_tasks(config: EvaluateConfig) -> None:
    """Build every task once, before a model is loaded: what the harness cannot read is refused here."""
    for task in expand(config.tasks):
        with harness_conditions(config):
            load_task(config, task)


def run_tasks(config: EvaluateConfig, checkpoint: Checkpoint, tokenizer_json: Path, context: Context) -> TaskScores:
    """Run config.tasks on a loaded model, in this process or on config.task_workers others through context.map.

    Writes tables/tasks (a row per metric) and, if asked to, samples/TASK.jsonl. The model's mode and the global random
    states are left as they were.
    """
    tasks = expand(config.tasks)
    folder = context.scratch_dir / "tasks"
    sweep_unfinished(folder)
    weights = file_sha256(checkpoint.directory / "model.safetensors")
    keys = {task: task_key(config, task, weights) for task in tasks}
    todo = []
    for task in tasks:
        earlier = kept(folder / task, keys[task])
        if earlier.problem is not None:
            context.warn(f"the kept result of {task} is damaged ({earlier.problem}); it is run again")
        if earlier.facts is None:
            todo.append(task)
    shares = [
        Share(
            config,
            {task: keys[task] for task in part},
            checkpoint.directory,
            tokenizer_json,
            context.scratch_dir,
            torch.get_num_threads(),
        )
        for part in divide(config, todo)
    ]
    if len(shares) > 1:
        for done, _ in enumerate(context.map(run_share, shares), start=1):
            context.progress(done, len(shares), "shares", phase="benchmarks")
    elif shares:
        run_here(shares[0], checkpoint, context, len(tasks) - len(todo), len(tasks))
    results = []
    for task in tasks:
        result = kept(folder / task, keys[task]).facts
        assert result is not None, "every share ends with its tasks on disk, or raises"
        results.append(result)
    for result in results:
        counts = result["counts"]
        if counts["truncated"]:
            context.warn(
                f"{result['task']}: {counts['truncated']} of {counts['requests']} prompts were longer than "
                f"{counts['max_length']} tokens and lost their first ones ({counts['tokens_cut']} tokens)"
            )
    rows = [row for result in results for row in result["rows"]]
    context.log_table(TABLE, rows)
    if config.log_samples:
        samples = context.output_dir / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            shutil.copyfile(folder / task / SAMPLES_FILE, samples / f"{task}.jsonl")
    metrics: dict[str, float] = {}
    for row in rows:
        name = f"{row['task']}/{row['metric']}"
        metrics |= {name: row["value"]} if row["value"] is not None else {}
        metrics |= {f"{name}_stderr": row["stderr"]} if row["stderr"] is not None else {}
    return TaskScores(metrics, {result["task"]: result["counts"] for result in results}, version("lm_eval"))


def divide(config: EvaluateConfig, tasks: Sequence[str]) -> list[list[str]]:
    """The tasks in at most `task_workers` shares, the largest files first, each to the share that has least so far."""
    if config.task_workers == 1 or len(tasks) < 2:
        return [list(tasks)] if tasks else []
    sizes = {task: sum(path.stat().st_size for path in files_of(config, task).values()) for task in tasks}
    shares: list[list[str]] = [[] for _ in range(min(config.task_workers, len(tasks)))]
    for task in sorted(tasks, key=lambda name: -sizes[name]):
        min(shares, key=lambda share: sum(sizes[name] for name in share)).append(task)
    return shares


def run_share(share: Share) -> None:
    """The body of a worker: its own copy of the model, the thread count of the stage, no progress of its own."""
    torch.set_num_threads(share.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = Context(share.scratch_dir, share.scratch_dir, rank=1)
    checkpoint = load_checkpoint(share.checkpoint, device)
    # This worker's GPU need not be the stage's.
    check_inference_kernels(checkpoint.model, torch.bfloat16 if share.config.dtype == "bfloat16" else torch.float32)
    run_here(share, checkpoint, context, 0, len(share.tasks))


def run_here(share: Share, checkpoint: Checkpoint, context: Context, before: int, total: int) -> None:
    """Run the tasks of a share one after another; `before` of `total` tasks were finished when it began."""
    for number, (task, key) in enumerate(share.tasks.items()):
        started = time.perf_counter()

        def show(done: int, requests: int, task: str = task, number: int = number, started: float = started) -> None:
            if context.stop_requested:
                raise Interrupted(f"evaluation stopped during {task}; the tasks before it are kept")
            rate = done / max(time.perf_counter() - started, 1e-9)
            eta = (requests - done) / max(rate, 1e-9)
            context.progress(
                done,
                requests,
                "requests",
                task=f"{task} ({before + number + 1}/{total})",
                requests_per_s=rate,
                eta_s=eta,
            )

        result, samples = evaluate_task(share.config, task, checkpoint, share.tokenizer_json, show)
        write = functools.partial(_write_result, share.config, result, samples)
        keep(share.scratch_dir / "tasks" / task, key, write)


def _write_result(
    config: EvaluateConfig, result: dict[str, Any], samples: Sequence[dict[str, Any]], directory: Path
) -> dict[str, Any]:
    """Write SAMPLES_FILE where samples are wanted; the result itself is what `keep` writes down as facts."""
    if config.log_samples:
        with (directory / SAMPLES_FILE).open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(sample, ensure_ascii=False, default=str)}\n" for sample in samples)
    return result


def task_key(config: EvaluateConfig, task: str, weights_sha256: str) -> str:
    """What a task's numbers depend on: the settings, the harness's version, the content of its files, the weights."""
    settings = config.model_dump(
        mode="json",
        exclude={"tasks", "task_data", "task_revisions", "task_workers", "prompts", "extrapolation", "probes"},
    )
    files = {split: file_sha256(path) for split, path in files_of(config, task).items()}
    return work_key(task, version("lm_eval"), config.task_revisions.get(task), settings, files, weights_sha256)


def evaluate_task(
    config: EvaluateConfig,
    task: str,
    checkpoint: Checkpoint,
    tokenizer_json: Path,
    show: Callable[[int, int], None] = lambda done, requests: None,  # noqa: ARG005
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """({"task", "rows", "counts"}, samples) of one task. show(done, requests) is called after every batch."""
    from lm_eval.evaluator import evaluate

    from lazypipe.stages.evaluate.benchmarks.harness import HarnessModel

    started = time.perf_counter()
    with harness_conditions(config), evaluating(checkpoint):
        built = load_task(config, task)
        model = HarnessModel(
            checkpoint.model,
            tokenizer_json,
            checkpoint.eos_id,
            max_length=config.max_length,
            bos=config.bos,
            batch_tokens=config.batch_tokens,
            dtype=config.dtype,
            seed=config.task_seeds[2],
            on_batch=show,
        )
        found = evaluate(
            model,
            {"tasks": {task: built}},
            limit=config.limit,
            bootstrap_iters=config.bootstrap_iters,
            log_samples=config.log_samples,
        )
    counts = {
        **asdict(model.counts),
        "documents": found["n-samples"][task]["effective"],
        "documents_available": found["n-samples"][task]["original"],
        "max_length": model.max_length,
        "seconds": round(time.perf_counter() - started, 3),
    }
    rows = metric_rows(task, found, counts)
    return {"task": task, "rows": rows, "counts": counts}, (found.get("samples") or {}).get(task, [])


def metric_rows(task: str, found: dict[str, Any], counts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per metric; `acc,none` of the harness is `acc`, `exact_match,strict` is `exact_match/strict`."""
    result = found["results"][task]
    rows = []
    for key, value in result.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        rows.append(
            {
                "task": task,
                "metric": metric if filter_name == "none" else f"{metric}/{filter_name}",
                "value": _finite(value),
                "stderr": _finite(result.get(f"{metric}_stderr,{filter_name}")),
                "higher_is_better": found["higher_is_better"][task].get(metric),
                "num_fewshot": found["n-shot"][task],
                "version": str(found["versions"][task]),
                **{name: counts[name] for name in ("documents", "requests", "truncated", "max_length", "seconds")},
            }
        )
    return rows


def _finite(value: Any) -> float | None:
    """A number the harness gave, None for "N/A" and what overflowed."""
    number = float(value) if isinstance(value, (int, float, np.floating, np.integer)) else math.nan
    return number if math.isfinite(number) else None


# ---- the conditions a task runs under


@contextlib.contextmanager
def harness_conditions(config: EvaluateConfig) -> Iterator[None]:
    """Seeds as the harness sets them and no output of its own; all global random states as before on the way out.

    Its bootstrap would fork a pool of processes: in a process with threads that may deadlock, so it runs here.
    """
    python_seed, numpy_seed, torch_seed, _ = config.task_seeds
    quiet, disabled = logging.getLogger("lm_eval"), logging.root.manager.disable
    level = quiet.level
    with preserved_random_states(), environment_variable("DISABLE_MULTIPROC", "1"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        random.seed(python_seed)
        np.random.seed(numpy_seed)
        torch.manual_seed(torch_seed)
        quiet.setLevel(logging.ERROR)
        logging.disable(max(disabled, logging.WARNING))
        silence = io.StringIO()
        try:
            with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                yield
        finally:
            logging.disable(disabled)
            quiet.setLevel(level)


@contextlib.contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """The variable set to `value` for this process, and as it was afterwards."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@contextlib.contextmanager
def evaluating(checkpoint: Checkpoint) -> Iterator[None]:
    """The model in eval mode, and in the mode it was in afterwards."""
    training = checkpoint.model.training
    checkpoint.model.eval()
    try:
        yield
    finally:
        checkpoint.model.train(training)
