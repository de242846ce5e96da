"""Benchmarks through `lazypipe run`: on Ray workers, in MLflow, in the recipe; bad input before any compute."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from lazypipe.model.checkpoint import load_checkpoint
from lazypipe.pipeline.execution.backends import Capacity, demand_of
from lazypipe.pipeline.experiment.schema import compose, load_experiment, local_files
from lazypipe.pipeline.planning.plan import build_nodes
from lazypipe.pipeline.planning.preflight import inspect_sources
from lazypipe.stages.contract import Context, UserError
from lazypipe.stages.evaluate.benchmarks.run import run_tasks
from lazypipe.stages.evaluate.config import EvaluateConfig
from tests.pipeline.tiny import FinishedRun, current_manifest, lazypipe, mlflow_runs
from tests.stages.evaluate.benchmarks.benchmark_files import write_files

TASKS = ("piqa", "copa", "wikitext")


def test_tasks_on_ray_workers_give_the_numbers_of_this_process(finished_run: FinishedRun, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(finished_run.root / "store", root / "store")
    files, _ = write_files(tmp_path / "files")
    chosen = {task: files[task] for task in TASKS}
    overrides = [f"evaluate.tasks={list(TASKS)}", f"evaluate.task_data={json.dumps(chosen)}", "evaluate.limit=3"]
    overrides += ["evaluate.task_workers=2", "evaluate.bootstrap_iters=20"]
    done = lazypipe("run", finished_run.config, *overrides, "--only", "evaluate/lazy", "--root", root)
    assert done.returncode == 0, done.stdout + done.stderr

    manifests = [json.loads(path.read_text()) for path in (root / "store" / "evaluate").glob("*/*/manifest.json")]
    manifest = next(m for m in manifests if m["variant"] == "lazy" and m["source"])
    assert manifest["source"]["tasks"].keys() == set(TASKS)
    assert "task_data" not in manifest["identity"] and manifest["facts"]["lm_eval"] == "0.4.13"

    trained = root / "store" / "pretrain" / current_manifest(root, "pretrain", "lazy")["fingerprint"][:12]
    folder = trained / (trained / "current").read_text().strip() / "checkpoint"
    checkpoint = load_checkpoint(folder)
    config = EvaluateConfig.model_validate(manifest["config"] | {"task_workers": 1})
    context = Context(tmp_path / "here", tmp_path / "here")
    context.output_dir.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(manifest["threads"])
    try:
        here = run_tasks(config, checkpoint, folder / "tokenizer.json", context)
    finally:
        torch.set_num_threads(threads)
    assert here.metrics.items() <= manifest["metrics"].items()
    assert {name.partition("/")[0] for name in here.metrics} == set(TASKS)

    run = next(run for run in mlflow_runs(root) if run.data.tags.get("lazypipe.stage") == "evaluate")
    assert run.data.metrics["piqa/acc"] == here.metrics["piqa/acc"]
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    try:
        table = MlflowClient().load_table(run.info.experiment_id, "tasks.json", run_ids=[run.info.run_id])
    finally:
        mlflow.set_tracking_uri(before)
    assert list(table["task"].unique()) == list(TASKS)
    rows = json.loads((context.output_dir / "tables" / "tasks.json").read_text())
    assert table["value"].tolist() == pytest.approx([row["value"] for row in rows], rel=1e-8)  # MLflow keeps 10 digits


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["evaluate.tasks=[hellaswagg]"], "no task 'hellaswagg'; did you mean 'hellaswag'"),
        (["evaluate.tasks=[piqa]", "evaluate.task_data={piqa: gone.jsonl}"], "gone.jsonl' does not exist"),
        (["evaluate.tasks=[piqa]", "evaluate.task_data={copa: gone.jsonl}"], "task_data names 'copa'"),
        (["evaluate.task_workers=two"], "evaluate.task_workers: must be a valid integer"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(overrides: list[str], said: str, finished_run: FinishedRun) -> None:
    done = lazypipe("plan", finished_run.config, *overrides)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert said in done.stderr


def compact(**evaluate: Any) -> dict[str, Any]:
    return {"name": "x", "variants": {"lazy": {"mixer": "lazy"}}, "evaluate": evaluate}


def test_file_contents_change_the_recipe_of_the_evaluation_alone(tmp_path: Path) -> None:
    files, _ = write_files(tmp_path / "files")

    def prints(**evaluate: Any) -> dict[str, str]:
        sources = inspect_sources(compose(compact(**evaluate)), tmp_path / "root")
        nodes = build_nodes(sources.experiment, sources.identity)
        return {node_id: node.fingerprint for node_id, node in nodes.items()}

    plain = prints()
    asked = prints(tasks=["piqa"], task_data={"piqa": files["piqa"]})
    assert {i for i in plain if plain[i] != asked[i]} == {"evaluate/lazy", "report"}
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copyfile(files["piqa"], moved)
    assert prints(tasks=["piqa"], task_data={"piqa": str(moved)}) == asked
    moved.write_text(moved.read_text().replace("goal number 0", "goal number 9"))
    assert prints(tasks=["piqa"], task_data={"piqa": str(moved)})["evaluate/lazy"] != asked["evaluate/lazy"]


def test_relative_paths_are_taken_from_the_working_directory() -> None:
    document = compact(tasks=["piqa", "rte"], task_data={"piqa": "a.jsonl"})
    document["variants"]["lazy"]["evaluate"] = {"task_data": {"rte": {"train": "b.jsonl", "validation": "~/c.jsonl"}}}
    experiment = compose(document)
    home = os.path.expanduser("~")  # noqa: PTH111
    assert local_files(experiment) == [str(Path.cwd() / "b.jsonl"), f"{home}/c.jsonl"]
    assert experiment.document["evaluate"]["task_data"]["piqa"] == str(Path.cwd() / "a.jsonl")


def test_a_prompt_length_the_model_cannot_take_is_refused() -> None:
    document = compact(tasks=["piqa"], max_length=512, extrapolation={"context_lengths": [64]})
    document["variants"] = {"random": {"mixer": "random_qk"}}
    document["sparsity"] = {"seq_len": 64}
    with pytest.raises(UserError, match=r"evaluate.max_length of variants.random: 512 tokens are more than"):
        compose(document)


def test_workers_hold_what_the_stage_holds() -> None:
    document = compact(tasks=["piqa", "rte"], task_workers=3)
    document["resources"] = {"evaluate": {"cpus": 2, "gpus": 1}}
    experiment = compose(document)
    node = build_nodes(experiment, {})["evaluate/lazy"]
    demand = demand_of(node, experiment, Capacity(8, 8, 4, 4))
    assert (demand.cpus, demand.gpus, demand.task_cpus, demand.task_gpus) == (6, 4, 2, 1)
    with pytest.raises(
        UserError, match=r"evaluate.task_workers=3 and the stage itself, \(1 \+ 3\) x 1 = 4 GPU asked for, but 2"
    ):
        demand_of(node, experiment, Capacity(8, 2, 4, 2))
    with pytest.raises(UserError, match=r"evaluate.task_workers=3 x 2 = 6 CPU asked for, but 4"):
        demand_of(node, experiment, Capacity(4, 8, 4, 4))


def test_the_experiment_file_loads_them(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nvariants: {lazy: {}}\nevaluate: {tasks: [lazy9], limit: 200, num_fewshot: 0}\n")
    evaluate = load_experiment(path).config(EvaluateConfig, "lazy")
    assert (evaluate.tasks, evaluate.limit, evaluate.num_fewshot) == (("lazy9",), 200, 0)
