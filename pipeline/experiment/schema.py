"""The experiment file: its schema, made of the stages' Configs, and how a document becomes one.

    YAML document -> Experiment{tokenize, variants{pretrain, evaluate, sparsity}, resources} -> one Config per stage

A variant's flat keys are fields of the model or of pretraining (their names are disjoint, see tests); `evaluate: {...}`
may nest below it. Nobody passes whole experiments down: each stage receives its own Config.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from lazypipe.model.config import BASELINES, ModelConfig
from lazypipe.pipeline.experiment.document import Document, read_document
from lazypipe.pipeline.experiment.old_keys import with_new_keys
from lazypipe.pipeline.experiment.validation import check, check_keys
from lazypipe.stages.config import StageConfig
from lazypipe.stages.contract import UserError, nearest
from lazypipe.stages.data.remote import is_uri
from lazypipe.stages.data.source_files import looks_like_a_path
from lazypipe.stages.data.sources import FilesSource, HubSource
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.overrides import apply_overrides
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.report.config import ReportConfig
from lazypipe.stages.sparsity.config import SparsityConfig
from lazypipe.stages.tokenization.config import FileTokenizer, HubTokenizer, TokenizeConfig


class Storage(StageConfig):
    root: str = Field("output", min_length=1, description="stage store, mlflow.db and artifacts live below it")


class StageResources(StageConfig):
    """What one execution of a stage occupies."""

    cpus: float | None = Field(None, gt=0, description="CPU cores held; default: 1, for tokenize all of the machine")
    gpus: float = Field(0, ge=0, description="GPUs held")
    threads: int | None = Field(None, gt=0, description="torch threads; default: the CPU cores held")


class PretrainResources(StageConfig):
    """Training: one worker without a GPU runs inside its stage task, everything else through Ray Train."""

    workers: int | dict[str, int] = Field(
        1,
        description="data-parallel workers; {min: 1, max: 4}: as many as there is room for, now and whenever "
        "`resize_interval_s` looks again",
    )
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each worker")
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores of each Ray Train worker")
    cpus: float | None = Field(
        None, gt=0, description="CPU cores held by training inside the stage task; default: all of the machine"
    )
    threads: int | None = Field(None, gt=0, description="torch threads of a worker; default: its CPU cores")
    max_failures: int = Field(3, ge=0, description="worker failures Ray Train recovers from before giving up")
    placement: Literal["PACK", "SPREAD"] = Field(
        "PACK", description="workers on as few nodes as possible, or on as many"
    )
    resize_interval_s: float = Field(
        60, gt=0, description="of a range of workers: seconds between looks for room for more"
    )

    @field_validator("workers", mode="plain")
    @classmethod
    def _check_workers(cls, value: Any) -> int | dict[str, int]:
        """A number, or a range that holds more than one."""
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError(f"must be greater than 0, found {value}")
            return value
        if not isinstance(value, Mapping) or set(value) != {"min", "max"}:
            raise ValueError(f"must be a number such as 2, or a range such as {{min: 1, max: 4}}, found {value!r}")
        low, high = value["min"], value["max"]
        if type(low) is not int or type(high) is not int or not 1 <= low <= high:
            raise ValueError(f"must have whole numbers 1 <= min <= max, found min={low!r}, max={high!r}")
        return low if low == high else {"min": low, "max": high}

    @property
    def worker_range(self) -> tuple[int, int]:
        """(fewest, most) workers."""
        if isinstance(self.workers, int):
            return self.workers, self.workers
        return self.workers["min"], self.workers["max"]

    @property
    def in_task(self) -> bool:
        return self.workers == 1 and self.gpus_per_worker == 0


class Resources(StageConfig):
    tokenize: StageResources = Field(StageResources(), description="tokenization")
    pretrain: PretrainResources = Field(PretrainResources(), description="pretraining")
    evaluate: StageResources = Field(StageResources(), description="evaluation")
    sparsity: StageResources = Field(StageResources(), description="attention analysis")
    report: StageResources = Field(StageResources(), description="the report")


class Variant(StageConfig):
    """One branch of the DAG."""

    pretrain: PretrainConfig
    evaluate: EvaluateConfig
    sparsity: SparsityConfig


class Experiment(StageConfig):
    """A whole experiment, checked."""

    name: str
    seed: int
    storage: Storage
    tokenize: TokenizeConfig
    variants: dict[str, Variant]
    report: ReportConfig
    resources: Resources
    document: dict[str, Any] = Field(
        description="the document it came from, after extends and overrides, paths absolute"
    )


SECTIONS = (
    "name", "seed", "storage", "tokenize", "model", "variants", "pretrain", "evaluate", "sparsity", "report",
    "resources",
)  # fmt: skip
MODEL_FIELDS = frozenset(ModelConfig.model_fields)
PRETRAIN_FIELDS = frozenset(PretrainConfig.model_fields) - {"model", "seed"}


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, override and check an experiment file. Relative source paths are taken from the working directory."""
    return compose(apply_overrides(read_document(path), overrides))


def compose(document: Document) -> Experiment:
    """Turn a document into a checked Experiment, or raise a UserError that names the key, the value and the remedy."""
    for key in document:
        if key not in SECTIONS:
            raise UserError(f"{key}: unknown section{nearest(str(key), SECTIONS)}")
    name = document.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"name: expected letters, digits, '.', '_' or '-', such as 'quickstart', found {name!r}")
    seed = document.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"seed: expected a non-negative integer, found {seed!r}")
    document = with_new_keys(_absolute_paths(document))
    tokenize = check(TokenizeConfig, _section(document, "tokenize"), "tokenize")
    variants = _section(document, "variants")
    if not variants:
        raise UserError("variants: at least one is needed, for example  variants: {lazy: {mixer: lazy}}")
    experiment = Experiment(
        name=name,
        seed=seed,
        storage=check(Storage, _section(document, "storage"), "storage"),
        tokenize=tokenize,
        variants={str(key): _variant(str(key), value, document, seed) for key, value in variants.items()},
        report=check(ReportConfig, {"title": name, **_section(document, "report")}, "report"),
        resources=check(Resources, _section(document, "resources"), "resources"),
        document=document,
    )
    _refuse_baselines_without_gpus(experiment)
    return experiment


def _refuse_baselines_without_gpus(experiment: Experiment) -> None:
    """Baselines compute on CUDA only, so an experiment with one asks for GPUs; whether they are there is seen later."""
    asked = experiment.resources
    needs = {
        "resources.pretrain.gpus_per_worker": asked.pretrain.gpus_per_worker,
        "resources.evaluate.gpus": asked.evaluate.gpus,
    }
    for name, variant in experiment.variants.items():
        mixer = variant.pretrain.model.mixer
        for key, gpus in needs.items():
            if mixer in BASELINES and gpus == 0:
                raise UserError(
                    f"variants.{name}.mixer={mixer} is a model of flash-linear-attention and runs on CUDA GPUs only, "
                    f"but {key} is 0; set it to 1 on a machine or cluster with GPUs, or leave the variant out with "
                    f"~variants.{name}"
                )


def _variant(name: str, fields: Any, document: Document, seed: int) -> Variant:
    where = f"variants.{name}"
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UserError(f"variants: {name!r} is not a variant's name; use a-z, 0-9 and _, such as 'lazy_128'")
    if fields is None:
        fields = {}
    if not isinstance(fields, dict):
        raise UserError(f"{where}: expected a mapping of model and pretrain fields, found {fields!r}")
    model_fields = dict(_section(document, "model"))
    pretrain_fields = dict(_section(document, "pretrain"))
    if "model" in pretrain_fields:
        raise UserError("pretrain.model: the model has its own section; move these fields to 'model'")
    evaluate_fields = dict(_section(document, "evaluate"))
    pretrain_fields.setdefault("seed", seed)
    evaluate_fields.setdefault("seed", seed)
    check_keys(ModelConfig, model_fields, "model")
    check_keys(PretrainConfig, pretrain_fields, "pretrain")
    check_keys(EvaluateConfig, evaluate_fields, "evaluate")
    own: dict[str, str] = {}
    for key, value in fields.items():
        if key in MODEL_FIELDS:
            model_fields[key] = value
            own[f"model.{key}"] = f"{where}.{key}"
        elif key in PRETRAIN_FIELDS or key == "seed":
            pretrain_fields[key] = value
            own[f"pretrain.{key}"] = f"{where}.{key}"
        elif key == "evaluate":
            if not isinstance(value, dict):
                raise UserError(f"{where}.evaluate: expected a mapping, found {value!r}")
            check_keys(EvaluateConfig, value, f"{where}.evaluate")
            evaluate_fields.update(value)
            own |= {f"evaluate.{below}": f"{where}.evaluate.{below}" for below in value}
        else:
            known = MODEL_FIELDS | PRETRAIN_FIELDS | {"seed", "evaluate"}
            raise UserError(f"{where}.{key}: unknown key{nearest(str(key), known)}")
    model = check(ModelConfig, model_fields, "model", own)
    _keep_ablations_of_hybrids(where, model, evaluate_fields, own)
    pretrain_fields["model"] = model.model_dump(mode="json", exclude_unset=True)
    variant = Variant(
        pretrain=check(PretrainConfig, pretrain_fields, "pretrain", own),
        evaluate=check(EvaluateConfig, evaluate_fields, "evaluate", own),
        sparsity=check(SparsityConfig, _section(document, "sparsity"), "sparsity"),
    )
    lengths = variant.evaluate.window_lengths()
    if variant.evaluate.max_length is not None:
        lengths.append(("evaluate.max_length", variant.evaluate.max_length))
    for key, length in [*lengths, ("sparsity.seq_len", variant.sparsity.seq_len)]:
        too_long = model.too_long(length)
        if too_long is not None:
            raise UserError(f"{own.get(key, key)} of {where}: {too_long}")
    return variant


def _keep_ablations_of_hybrids(where: str, model: ModelConfig, fields: dict[str, Any], own: Mapping[str, str]) -> None:
    """A uniform variant leaves out the ablations that the section `evaluate` asks for; its own are refused."""
    mixers = set(model.layer_mixers)
    if len(mixers) > 1 or not fields.get("ablations") or not isinstance(fields["ablations"], list):
        return
    key = own.get("evaluate.ablations")
    if key is not None:
        raise UserError(
            f"{key}: {fields['ablations']} takes out the layers that are not standard, but every layer of {where} is "
            f"{mixers.pop()}; they are for hybrids, a mixer with a pattern, so remove the key"
        )
    del fields["ablations"]


def _section(document: Document, key: str) -> dict[str, Any]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{key}: expected a mapping, found {value!r}")
    return value


def _absolute_paths(document: Document) -> Document:
    """Make the paths of data and tokenizer absolute, so that the document means the same from another folder."""
    document = json.loads(json.dumps(document, default=str))
    tokenize = _section(document, "tokenize")
    source, tokenizer = tokenize.get("source"), tokenize.get("tokenizer")
    if isinstance(source, dict) and source.get("kind") == "files" and isinstance(source.get("paths"), str):
        raise UserError(f"tokenize.source.paths: expected a list, found {source['paths']!r}; write [{source['paths']}]")
    if isinstance(source, dict) and isinstance(source.get("paths"), list):
        source["paths"] = [_absolute(p) if isinstance(p, str) and not is_uri(p) else p for p in source["paths"]]
    if isinstance(tokenizer, dict) and isinstance(tokenizer.get("path"), str):
        tokenizer["path"] = _absolute(tokenizer["path"])
    for part, key in ((source, "dataset"), (tokenizer, "name")):
        if isinstance(part, dict) and part.get("kind") == "hub" and isinstance(part.get(key), str):
            part[key] = _absolute_directory(part[key])
    variants = document.get("variants")
    for section in (document, *(variants.values() if isinstance(variants, dict) else ())):
        evaluate = section.get("evaluate") if isinstance(section, dict) else None
        if isinstance(evaluate, dict) and isinstance(evaluate.get("task_data"), dict):
            evaluate["task_data"] = {task: _absolute_files(files) for task, files in evaluate["task_data"].items()}
    return document


def _absolute_files(files: Any) -> Any:
    """The file of a task, or its files by split, made absolute; anything else as it is, for its Config to refuse."""
    if isinstance(files, dict):
        return {split: _absolute(path) if isinstance(path, str) else path for split, path in files.items()}
    return _absolute(files) if isinstance(files, str) else files


def _absolute_directory(name: str) -> str:
    """A hub name that is a local directory or can only be a path, made absolute; any other as it is.

    Whether there is such a directory is asked when planning, for it may be on the cluster only.
    """
    path = _absolute(name)
    return path if looks_like_a_path(name) or (name and Path(path).is_dir()) else name


def _absolute(path: str) -> str:
    if not path:
        return path  # its Config refuses it; as a path it would be the working directory
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111  (keeps globs and symbolic links as they are)


def resolve_root(experiment: Experiment | None, root_option: str | None) -> Path:
    """Where everything is written: LAZYPIPE_HOME > --root > storage.root > 'output', absolute."""
    chosen = os.environ.get("LAZYPIPE_HOME") or root_option or (experiment.storage.root if experiment else "output")
    try:
        root = Path(chosen).expanduser().resolve()
        existing = next(p for p in (root, *root.parents) if p.exists())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL character, an unknown ~user, a loop of links
        raise UserError(f"the root {chosen!r} is not a usable path: {error}; choose another with --root") from error
    if not existing.is_dir():
        raise UserError(f"the root {str(root)!r} is not a directory: {existing} is a file; choose another with --root")
    return root


def task_files(experiment: Experiment) -> list[str]:
    """The benchmark files an experiment reads."""
    found = [
        path
        for variant in experiment.variants.values()
        for files in variant.evaluate.task_data.values()
        for path in ([files] if isinstance(files, str) else files.values())
    ]
    return list(dict.fromkeys(found))


def source_files(config: TokenizeConfig) -> list[str]:
    """The paths a corpus is read from, for the submitter, which has to say what travels and what does not."""
    paths: list[str] = []
    if isinstance(config.source, FilesSource):
        paths += [path for path in config.source.paths if not is_uri(path)]  # every node reads those itself
    if isinstance(config.source, HubSource) and looks_like_a_path(config.source.dataset):
        paths.append(config.source.dataset)
    if isinstance(config.tokenizer, FileTokenizer):
        paths.append(config.tokenizer.path)
    if isinstance(config.tokenizer, HubTokenizer) and looks_like_a_path(config.tokenizer.name):
        paths.append(config.tokenizer.name)
    return paths
