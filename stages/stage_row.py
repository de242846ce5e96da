"""What the pipeline knows about a stage: one row of the table in stages/registry.py. Imports no torch.

The pipeline works from rows and knows no stage by its name. A row says what a stage is, how its section of the
experiment file is read, what planning asks about its Config, and how it is run. All but the first five fields have
defaults that suit a stage which reads the results of others on one CPU core and leaves nothing special behind.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel

from lazypipe.stages.config import StageConfig
from lazypipe.stages.facts import Facts

if TYPE_CHECKING:
    from lazypipe.model.config import ModelConfig


class Window(NamedTuple):
    """A stretch of `length` tokens (and one to predict) that a stage reads from a split; `key` asks for it."""

    key: str
    split: Literal["train", "validation"]
    length: int


class Vocabulary(NamedTuple):
    """exact: whether `size` is the number of tokens, or only what it cannot exceed."""

    size: int
    exact: bool


class CorpusSize(NamedTuple):
    """text_bytes: of the source, 0 when unknown. vocab_size: a guess until the corpus is tokenized."""

    text_bytes: int
    vocab_size: int


class Section(NamedTuple):
    """A heading of docs/configuration.md with the fields of one Config below it."""

    title: str
    config: type[BaseModel]
    text: str


def _unchanged(config: Any) -> Any:
    return config


def _no_identity(config: Any, cache_dir: Path | None) -> Mapping[str, Any]:  # noqa: ARG001
    return {}


def _no_paths(section: dict[str, Any]) -> None:
    """A section without paths."""


def _no_adaptation(where: str, model: ModelConfig, fields: dict[str, Any], own: Mapping[str, str]) -> None:
    """A section that means the same for every model."""


def _none(config: Any) -> Sequence[Any]:  # noqa: ARG001
    return ()


def _no_disk(config: Any, corpus: CorpusSize) -> int:  # noqa: ARG001
    return 0


def _one(config: Any) -> int:  # noqa: ARG001
    return 1


def _never(config: Any) -> bool:  # noqa: ARG001
    return False


@dataclass(frozen=True, kw_only=True)
class CorpusPlanning:
    """What planning asks of the stage that makes the corpus."""

    check: Callable[..., int]  # (config, cache_dir, min_tokens=) -> bytes of text; UserError for a source that fails
    vocabulary: Callable[[Any], Vocabulary | None]  # of a corpus that is not tokenized yet; None when unbounded


@dataclass(frozen=True, kw_only=True)
class ModelPlanning:
    """What planning asks of the stage that makes the models. Its Config holds the ModelConfig in its field `model`."""

    model: Callable[[Any], ModelConfig]
    costs: Callable[[Any, Vocabulary | None, int], dict[str, Any]]  # (config, vocabulary, workers) -> a row of costs


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """One stage. `name` is also its section of the experiment file, its folder of the store and its MLflow tag.

    function and the other texts of the form "module:function" are imported when they are called.
    """

    name: str
    description: str  # of its resources: 'tokenization'
    function: str  # "module:function", called as run(config, inputs, context) -> Outputs
    config: type[StageConfig]
    facts: type[Facts]  # what it promises the stages and commands after it
    inputs: tuple[str, ...] = ()  # the stages whose results it reads: of its own variant, or of all when it runs once
    per_variant: bool = True
    makes_report: bool = False  # report.json, report.html: printed at the end of a run and logged on its MLflow run
    corpus: CorpusPlanning | None = None  # of the stage that makes the corpus: train/ and validation/ token shards
    models: ModelPlanning | None = None  # of the stage that makes the models: checkpoint/

    # ---- its section of the experiment file
    from_experiment: Mapping[str, str] | None = None  # field -> key of the experiment file that its default comes from
    in_variant: Literal["flat", "nested"] | None = None  # how a variant sets its fields: flat keys, or `name: {...}`
    absolute_paths: Callable[[dict[str, Any]], None] = _no_paths  # makes the paths in a section absolute, in place
    # (where, model, section, own keys) -> None: fits the section to the variant's model, in place
    adapt: Callable[[str, ModelConfig, dict[str, Any], Mapping[str, str]], None] = _no_adaptation
    model_lengths: Callable[[Any], Sequence[tuple[str, int]]] = _none  # (key, tokens) the model reads at once
    sections: tuple[Section, ...] = ()  # of docs/configuration.md

    # ---- planning
    pin: Callable[[Any], Any] = _unchanged  # the same Config with hub revisions resolved and paths absolute
    source_identity: Callable[[Any, Path | None], Mapping[str, Any]] = _no_identity  # what data adds to the fingerprint
    local_files: Callable[[Any], Sequence[str]] = _none  # what it reads from disks, for the submitter to name
    windows: Callable[[Any], Sequence[Window]] = _none  # what it needs of the corpus
    disk_bytes: Callable[[Any, CorpusSize], int] = _no_disk  # what it writes, at most

    # ---- running
    uses_torch: bool = False  # then torch's threads are set before it runs
    whole_machine: bool = False  # by default it holds all CPU cores of a node, not one
    on_workers: bool = False  # may run on several Ray Train workers, and with one worker in its task
    prepare_worker: str | None = None  # "module:function" of a Config, called in a Ray Train worker before CUDA is used
    baselines_need_gpus: bool = False  # baselines compute in it, which they do on GPUs only
    saves_on_stop: bool = False  # when asked to stop it saves its state and leaves; others are cancelled
    resumes: Callable[[Any], bool] = _never  # whether an interrupted execution goes on where it was
    maps_with_own_resources: bool = False  # each item of its map holds what the stage holds, not one CPU core
    map_workers: Callable[[Any], int] = _one  # items of its map at a time, when each holds what the stage holds
    map_workers_key: str = ""  # the field that asks for them
    check_publish: str | None = None  # "module:function" of a Config: refuses a target before anything is computed
    publish: str | None = None  # "module:function" of (Config, generation's directory) -> a line of text or None

    # ---- MLflow
    corpus_role: Literal["tokenized", "training", "evaluation"] | None = None  # of the corpus among a run's datasets
    watch_machine: bool = False  # log CPU, memory and GPU use while it runs
    headline: tuple[str, ...] = ()  # metrics shown when it is done

    def load(self) -> Callable[..., Any]:
        """The function that runs the stage."""
        return load_function(self.function)


def load_function(place: str) -> Callable[..., Any]:
    """Import "module:function"."""
    module, _, name = place.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
