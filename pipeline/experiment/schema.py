"""The experiment file: its schema, made of the rows of the stages, and how a document becomes an Experiment.

    YAML document -> Experiment{configs by node id, resources by stage} -> one Config per stage and variant

A variant's flat keys are fields of the model or of the stage whose row says "flat" (their names are disjoint, see
tests); the sections of stages that say "nested" may stand below it. Nobody passes whole experiments down: each stage
receives its own Config.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from lazypipe.model.config import ModelConfig
from lazypipe.pipeline.experiment.document import Document, read_document
from lazypipe.pipeline.experiment.old_keys import with_new_keys
from lazypipe.pipeline.experiment.resources import StageResources, WorkerResources, resources_model
from lazypipe.pipeline.experiment.validation import check, check_keys
from lazypipe.stages.config import StageConfig
from lazypipe.stages.contract import UserError, nearest
from lazypipe.stages.overrides import apply_overrides
from lazypipe.stages.registry import STAGES
from lazypipe.stages.stage_row import StageRow

AnyConfig = TypeVar("AnyConfig", bound=StageConfig)
MODEL = "model"  # the section of the ModelConfig, and the field of the Config that holds it


class Storage(StageConfig):
    root: str = Field("output", min_length=1, description="stage store, mlflow.db and artifacts live below it")


@dataclass(frozen=True)
class Experiment:
    """A whole experiment, checked.

    rows: its stages, each behind its inputs. configs: the Config of every node, by node id: 'stage' of a stage that
    runs once, else 'stage/variant'. resources: by stage. document: what it came from, after extends and overrides,
    paths absolute.
    """

    name: str
    seed: int
    storage: Storage
    rows: tuple[StageRow, ...]
    variants: tuple[str, ...]
    configs: Mapping[str, StageConfig]
    resources: Mapping[str, StageResources | WorkerResources]
    document: Document

    def config(self, kind: type[AnyConfig], variant: str | None = None) -> AnyConfig:
        """The Config of that class: of a stage that runs once, or of a variant. KeyError when there is none."""
        for row in self.rows:
            config = self.configs.get(id_of_node(row, variant))
            if row.per_variant == (variant is not None) and isinstance(config, kind):
                return config
        raise KeyError(f"{kind.__name__} of {variant}")

    def row_and_config(self, node: str) -> tuple[StageRow, StageConfig]:
        """The stage's row and the Config of a node."""
        stage = node.partition("/")[0]
        return next(row for row in self.rows if row.name == stage), self.configs[node]


def id_of_node(row: StageRow, variant: str | None) -> str:
    """'stage' of a stage that runs once, else 'stage/variant'."""
    return f"{row.name}/{variant}" if row.per_variant else row.name


def section_names(rows: Sequence[StageRow] = STAGES) -> tuple[str, ...]:
    """The keys an experiment file may have at its top."""
    return ("name", "seed", "storage", MODEL, "variants", *(row.name for row in rows), "resources")


MODEL_FIELDS = frozenset(ModelConfig.model_fields)


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, override and check an experiment file. Relative source paths are taken from the working directory."""
    return compose(apply_overrides(read_document(path), overrides))


def compose(document: Document, rows: tuple[StageRow, ...] = STAGES) -> Experiment:
    """Turn a document into a checked Experiment of the stages `rows`, each behind its inputs.

    UserError names the key, the value and the remedy.
    """
    for key in document:
        if key not in section_names(rows):
            raise UserError(f"{key}: unknown section{nearest(str(key), section_names(rows))}")
    name = document.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"name: expected letters, digits, '.', '_' or '-', such as 'quickstart', found {name!r}")
    seed = document.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"seed: expected a non-negative integer, found {seed!r}")
    document = with_new_keys(_absolute_paths(document, rows), rows)
    variants = {str(key): value for key, value in _section(document, "variants").items()}
    if not variants:
        raise UserError("variants: at least one is needed, for example  variants: {lazy: {mixer: lazy}}")
    given = {"name": name, "seed": seed}
    configs = {
        row.name: check(row.config, _section_of(row, document, given), row.name) for row in rows if not row.per_variant
    }
    for variant, fields in variants.items():
        configs |= _variant(variant, fields, document, given, [row for row in rows if row.per_variant])
    resources = check(resources_model(rows), _section(document, "resources"), "resources")
    experiment = Experiment(
        name=name,
        seed=seed,
        storage=check(Storage, _section(document, "storage"), "storage"),
        rows=rows,
        variants=tuple(variants),
        configs=configs,
        resources={row.name: getattr(resources, row.name) for row in rows},
        document=document,
    )
    _refuse_baselines_without_gpus(experiment)
    return experiment


def models(experiment: Experiment) -> dict[str, ModelConfig]:
    """The model of each variant."""
    return {
        variant: row.models.model(experiment.configs[id_of_node(row, variant)])
        for row in experiment.rows
        for variant in experiment.variants
        if row.models is not None
    }


def _refuse_baselines_without_gpus(experiment: Experiment) -> None:
    """Baselines compute on CUDA only, so an experiment with one asks for GPUs; whether they are there is seen later."""
    needs = {}
    for row in experiment.rows:
        if row.baselines_need_gpus:
            asked = experiment.resources[row.name]
            key = f"resources.{row.name}"
            if isinstance(asked, WorkerResources):
                needs[f"{key}.gpus_per_worker"] = asked.gpus_per_worker
            else:
                needs[f"{key}.gpus"] = asked.gpus
    for name, model in models(experiment).items():
        for key, gpus in needs.items():
            if model.mechanism.whole_model and gpus == 0:
                raise UserError(
                    f"variants.{name}.mixer={model.mixer} is a model of flash-linear-attention and runs on CUDA GPUs "
                    f"only, but {key} is 0; set it to 1 on a machine or cluster with GPUs, or leave the variant out "
                    f"with ~variants.{name}"
                )


def flat_fields(row: StageRow) -> frozenset[str]:
    """The fields of a stage that a variant may write flat; its model's are written flat as well."""
    return frozenset(row.config.model_fields) - {MODEL} if row.in_variant == "flat" else frozenset()


def _variant(
    name: str, fields: Any, document: Document, given: Mapping[str, Any], rows: Sequence[StageRow]
) -> dict[str, StageConfig]:
    """The Configs of a variant by node id: the sections, with what the variant itself sets in its `fields`."""
    where = f"variants.{name}"
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UserError(f"variants: {name!r} is not a variant's name; use a-z, 0-9 and _, such as 'lazy_128'")
    if fields is None:
        fields = {}
    if not isinstance(fields, dict):
        raise UserError(f"{where}: expected a mapping of model and pretrain fields, found {fields!r}")
    model_fields = dict(_section(document, MODEL))
    sections = {row.name: _section_of(row, document, given) for row in rows}
    for row in rows:
        if row.models is not None and MODEL in sections[row.name]:
            raise UserError(f"{row.name}.model: the model has its own section; move these fields to 'model'")
    check_keys(ModelConfig, model_fields, MODEL)
    for row in rows:
        check_keys(row.config, sections[row.name], row.name)
    own = _write_own_fields(where, fields, model_fields, sections, rows)
    model = check(ModelConfig, model_fields, MODEL, own)
    configs: dict[str, StageConfig] = {}
    for row in rows:
        row.adapt(where, model, sections[row.name], own)
        if row.models is not None:
            sections[row.name][MODEL] = model.model_dump(mode="json", exclude_unset=True)
    for row in rows:
        configs[id_of_node(row, name)] = check(row.config, sections[row.name], row.name, own)
    for row in rows:
        for key, length in row.model_lengths(configs[id_of_node(row, name)]):
            too_long = model.too_long(length)
            if too_long is not None:
                raise UserError(f"{own.get(key, key)} of {where}: {too_long}")
    return configs


def _write_own_fields(
    where: str,
    fields: Mapping[str, Any],
    model: dict[str, Any],
    sections: Mapping[str, dict[str, Any]],
    rows: Sequence[StageRow],
) -> dict[str, str]:
    """Write what a variant sets into the model and the sections; returns dotted keys and where the user wrote them."""
    flat = {field: row.name for row in rows for field in flat_fields(row)}
    nested = {row.name: row for row in rows if row.in_variant == "nested"}
    own: dict[str, str] = {}
    for key, value in fields.items():
        if key in MODEL_FIELDS:
            model[key] = value
            own[f"{MODEL}.{key}"] = f"{where}.{key}"
        elif key in flat:
            sections[flat[key]][key] = value
            own[f"{flat[key]}.{key}"] = f"{where}.{key}"
        elif key in nested:
            if not isinstance(value, dict):
                raise UserError(f"{where}.{key}: expected a mapping, found {value!r}")
            check_keys(nested[key].config, value, f"{where}.{key}")
            sections[key].update(value)
            own |= {f"{key}.{below}": f"{where}.{key}.{below}" for below in value}
        else:
            raise UserError(f"{where}.{key}: unknown key{nearest(str(key), {*MODEL_FIELDS, *flat, *nested})}")
    return own


def _section_of(row: StageRow, document: Document, given: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's section, with the fields whose defaults come from the experiment's own keys."""
    defaults = {field: given[key] for field, key in (row.from_experiment or {}).items()}
    return defaults | _section(document, row.name)


def _section(document: Document, key: str) -> dict[str, Any]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{key}: expected a mapping, found {value!r}")
    return value


def _absolute_paths(document: Document, rows: Sequence[StageRow]) -> Document:
    """Make the paths in all sections absolute, so that the document means the same from another folder."""
    document = json.loads(json.dumps(document, default=str))
    for row in rows:
        row.absolute_paths(_section(document, row.name))
    variants = document.get("variants")
    for variant in variants.values() if isinstance(variants, dict) else ():
        for row in rows:
            section = variant.get(row.name) if isinstance(variant, dict) and row.in_variant == "nested" else None
            if isinstance(section, dict):
                row.absolute_paths(section)
    return document


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


def local_files(experiment: Experiment) -> list[str]:
    """The files that stages read from disks: corpus, tokenizer, benchmarks."""
    paths: list[str] = []
    for node in experiment.configs:
        row, config = experiment.row_and_config(node)
        paths += row.local_files(config)
    return list(dict.fromkeys(paths))
