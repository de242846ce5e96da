"""The harness's own definition of a benchmark, found by name and pointed at a local file or a pinned hub dataset.

The harness finds its 13,000 tasks by parsing all their YAML files, which takes ten seconds. The suites' tasks are known
here, any other is found by a pattern in a third of a second, and no name is looked for without need. Only `load_task`
imports the harness.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lazypipe.stages.contract import UserError, closest, first_line
from lazypipe.stages.evaluate.benchmarks.suites import SUITES, expand
from lazypipe.stages.evaluate.benchmarks.task_files import check_file, read_rows
from lazypipe.stages.evaluate.config import EvaluateConfig

INSTALL = 'python -m pip install -c constraints.txt -e ".[eval]"'
SPLITS = ("train", "validation", "test")
EVALUATED = "evaluated"  # the split the harness evaluates, whichever that is

FILES = {  # below lm_eval/tasks
    "wikitext": "wikitext/wikitext.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "sciq": "sciq/sciq.yaml",
    "rte": "glue/rte/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
_KEY = re.compile(r"^[\"']?(task|group|class)[\"']?:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)
_FILE_BUILDERS = ("json", "csv", "text", "parquet", "arrow")  # of `datasets`: no dataset of the hub


def tasks_folder() -> Path:
    """lm_eval/tasks, without importing the harness."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise UserError(
            f"evaluate.tasks needs lm-evaluation-harness, which is not installed; install it with  {INSTALL}  or "
            "leave evaluate.tasks out"
        )
    return Path(found.origin).parent / "tasks"


def definition(task: str) -> Path:
    """The YAML file that defines `task`; a UserError that offers the nearest names when there is none."""
    folder = tasks_folder()
    known = folder / FILES[task] if task in FILES else None
    if known is not None and known.is_file():
        return known
    names = scan(folder)
    if task not in names:
        close = closest(task.strip().lower(), {*SUITES, *names}, 3)
        offered = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
        raise UserError(
            f"evaluate.tasks: lm-evaluation-harness has no task {task!r}{offered} The suites are {', '.join(SUITES)}"
        )
    kind, path = names[task]
    if kind != "task":
        what = "a group of tasks; name its tasks one by one" if kind == "group" else "written in Python, not YAML"
        raise UserError(f"evaluate.tasks: {task!r} is {what}: see {path}")
    return path


def scan(folder: Path) -> dict[str, tuple[str, Path]]:
    """Every name below lm_eval/tasks -> ("task", "group" or "class", its file)."""
    names: dict[str, tuple[str, Path]] = {}
    for parent, _, files in os.walk(folder):
        for file in files:
            if not file.endswith(".yaml"):
                continue
            path = Path(parent) / file
            keys = dict(_KEY.findall(path.read_text(encoding="utf-8")))
            if "group" in keys:
                names.setdefault(keys["group"], ("group", path))
            elif "task" in keys:
                names[keys["task"]] = ("class" if "class" in keys else "task", path)
    return names


def hub_dataset(path: Path) -> str:
    """The `dataset_path` of a definition, its includes followed."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r"^[\"']?dataset_path[\"']?:[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE)
    if found:
        return found[1]
    for include in re.findall(r"^[\"']?include[\"']?:[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE):
        return hub_dataset(path.parent / include)
    return ""


def files_of(config: EvaluateConfig, task: str) -> dict[str, Path]:
    """{split: file} of a task; a file given without a split is that of EVALUATED. Empty for a task from the hub."""
    files = config.task_data.get(task, {})
    found = {EVALUATED: files} if isinstance(files, str) else files
    return {split: Path(path) for split, path in found.items()}


# ---- planning


def pin_tasks(config: EvaluateConfig) -> EvaluateConfig:
    """The same config with the revision of every hub dataset resolved to a commit. Changes no fingerprint."""
    from lazypipe.stages.data.hub import resolve_commit

    revisions = dict(config.task_revisions)
    for task in expand(config.tasks):
        dataset = "" if task in config.task_data else hub_dataset(definition(task))
        if not dataset or dataset in _FILE_BUILDERS:
            continue
        try:
            revisions[task] = resolve_commit("dataset", dataset, revisions.get(task))
        except UserError as refusal:
            raise UserError(
                f"evaluate.tasks: {task} has no file in evaluate.task_data, and {refusal}; or name a local file: "
                f"evaluate.task_data: {{{task}: PATH}}"
            ) from None
    return config.model_copy(update={"task_revisions": revisions}) if revisions != config.task_revisions else config


def tasks_identity(config: EvaluateConfig, cache_dir: Path | None) -> dict[str, Any]:
    """What of the tasks' data enters the fingerprint: contents and commits, never paths. Refuses what cannot work.

    {task: {split: sha256}} of local files, {task: commit} of the hub's. Empty without tasks.
    """
    found: dict[str, Any] = {}
    for task in expand(config.tasks):
        definition(task)
        if task in config.task_data:
            files = files_of(config, task)
            if not files:
                raise UserError(f"evaluate.task_data.{task}: names no file; write a path, or {{validation: PATH}}")
            found[task] = {split: check_file(path, task, cache_dir) for split, path in files.items()}
        else:
            found[task] = config.task_revisions.get(task, "")
    return {"tasks": found} if found else {}


# ---- building


def load_task(config: EvaluateConfig, task: str) -> Any:
    """The harness's ConfigurableTask of `task`, its documents read. UserError when they cannot be had or used.

    The caller silences and seeds: a task may draw from the global random states while it is built.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    fields = load_yaml(definition(task))
    files = files_of(config, task)
    if files:
        _use_files(fields, files, task)
    elif task in config.task_revisions:
        fields["dataset_kwargs"] = {**(fields.get("dataset_kwargs") or {}), "revision": config.task_revisions[task]}
    try:
        built = ConfigurableTask(config=fields)
    except UserError:
        raise
    except Exception as error:  # of datasets, the hub, Jinja, or the task's own functions
        name = type(error).__name__
        if files:
            where = ", ".join(str(path) for path in files.values())
            raise UserError(
                f"evaluate.task_data.{task}: {where} does not fit the harness's task: {name}: {first_line(error)}; "
                f"it is read by {definition(task)}"
            ) from error
        raise UserError(
            f"evaluate.tasks: {task} could not be loaded from the hub ({fields.get('dataset_path')}): {name}: "
            f"{first_line(error)}; or name a local file: evaluate.task_data: {{{task}: PATH}}"
        ) from error
    if config.num_fewshot is not None and built.get_config("num_fewshot") != 0:
        built.set_config(key="num_fewshot", value=config.num_fewshot)
    elif built.get_config("num_fewshot") is None:
        built.set_config(key="num_fewshot", value=0)
    built.set_fewshot_seed(seed=config.task_seeds[3])
    if files:
        _refuse_missing_fields(built, task, files)
    shots, spare = built.get_config("num_fewshot"), 0 if "train" in files else 1
    if files and shots and (examples := len(built.fewshot_docs())) < shots + spare:
        raise UserError(
            f"evaluate.num_fewshot={shots}: the files of {task} hold {examples} documents to take examples from"
            f"{', the question itself among them' if spare else ''}; lower it, or give a larger train split"
        )
    return built


def _refuse_missing_fields(built: Any, task: str, files: Mapping[str, Path]) -> None:
    """Refuse files without a field the task's templates read: Jinja would write nothing in its place."""
    from jinja2 import Environment, meta

    environment = Environment()
    read: set[str] = set()
    for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        template = built.get_config(name)
        if isinstance(template, str):
            read |= meta.find_undeclared_variables(environment.parse(template)) - environment.globals.keys()
            if name == "doc_to_target" and template.isidentifier() and built.OUTPUT_TYPE == "multiple_choice":
                read.add(template)  # the name of a column
    missing = sorted(read - set(built.features))
    if missing:
        raise UserError(
            f"evaluate.task_data.{task}: {', '.join(str(path) for path in files.values())} does not fit the harness's "
            f"task: it reads {', '.join(map(repr, missing))}, and the file has {', '.join(built.features)}"
        )


def _use_files(fields: dict[str, Any], files: Mapping[str, Path], task: str) -> None:
    """Point a definition at local files: their splits, None for those that are absent."""
    import datasets

    names = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    evaluated = "test" if fields.get("test_split") else "validation"
    by_split = {evaluated if split == EVALUATED else split: path for split, path in files.items()}
    if not by_split.keys() & {"validation", "test"}:
        raise UserError(f"evaluate.task_data.{task}: has a train split alone; add the validation or the test split")
    rows = {split: read_rows(path, task) for split, path in by_split.items()}
    for split in SPLITS:
        fields[names[split]] = split if split in rows else None
    # Worked examples come from the train split. Without one the harness takes them from the evaluated split, and leaves
    # the question itself out only where both are named alike: "test" and "test", or None and None.
    fields["fewshot_split"] = "train" if "train" in rows else "test" if rows.keys() == {"test"} else None
    if isinstance(fields.get("fewshot_config"), dict):
        fields["fewshot_config"] = {key: value for key, value in fields["fewshot_config"].items() if key != "split"}
    fields["dataset_kwargs"] = None
    fields["custom_dataset"] = lambda **_: datasets.DatasetDict(
        {split: datasets.Dataset.from_list(found) for split, found in rows.items()}
    )
