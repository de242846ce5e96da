"""What planning asks about an EvaluateConfig: paths, windows, workers, and which variants it ablates. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lazypipe.model.config import ModelConfig
from lazypipe.stages.contract import UserError
from lazypipe.stages.data.paths import absolute
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.stage_row import Window


def make_paths_absolute(section: dict[str, Any]) -> None:
    """Make the benchmark files in a section `evaluate` absolute, in place."""
    if isinstance(section.get("task_data"), dict):
        section["task_data"] = {task: _absolute_files(files) for task, files in section["task_data"].items()}


def _absolute_files(files: Any) -> Any:
    """The file of a task, or its files by split, made absolute; anything else as it is, for its Config to refuse."""
    if isinstance(files, dict):
        return {split: absolute(path) if isinstance(path, str) else path for split, path in files.items()}
    return absolute(files) if isinstance(files, str) else files


def local_files(config: EvaluateConfig) -> list[str]:
    """The benchmark files it reads."""
    return [
        path for files in config.task_data.values() for path in ([files] if isinstance(files, str) else files.values())
    ]


def keep_ablations_of_hybrids(where: str, model: ModelConfig, fields: dict[str, Any], own: Mapping[str, str]) -> None:
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


def windows(config: EvaluateConfig) -> list[Window]:
    """The windows it scores."""
    return [Window(key, "validation", length) for key, length in config.window_lengths()]


def model_lengths(config: EvaluateConfig) -> list[tuple[str, int]]:
    """(key, tokens) of every text that passes through the model at once."""
    prompt = [] if config.max_length is None else [("evaluate.max_length", config.max_length)]
    return [*config.window_lengths(), *prompt]


def resumes(config: EvaluateConfig) -> bool:
    """The results of finished benchmarks are kept; the rest of an evaluation begins again."""
    return bool(config.tasks)


def map_workers(config: EvaluateConfig) -> int:
    """Workers that the benchmarks are spread over."""
    return config.task_workers if config.tasks else 1
