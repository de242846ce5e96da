"""The page docs/configuration.md: `python -m lazypipe.pipeline.experiment.reference > docs/configuration.md`."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator

from pydantic import BaseModel

from lazypipe.model.config import ModelConfig
from lazypipe.pipeline.experiment.schema import PretrainResources, StageResources, Storage
from lazypipe.stages.data.sources import EmbeddedSource, FilesSource, HubSource
from lazypipe.stages.evaluate.config import EvaluateConfig, ExtrapolationConfig, ProbesConfig
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.report.config import ReportConfig
from lazypipe.stages.sparsity.config import SparsityConfig
from lazypipe.stages.tokenization.config import FileTokenizer, Filters, HubTokenizer, TokenizeConfig, TrainTokenizer

HEAD = """# The experiment file, field by field

Made from the code by `python -m lazypipe.pipeline.experiment.reference > docs/configuration.md`; a test keeps it true.

Top level: `name` (of the experiment; also its MLflow experiment), `seed` (of training and evaluation; nothing in
tokenization is random), `extends` (one parent file, merged below this one), and the sections below. `variants` maps a
name (`[a-z0-9_]+`) to fields of `model` and `pretrain`, written flat; `evaluate: {...}` may nest there.

Fields marked *operational* say how a stage runs and not what it computes: changing them recomputes nothing.
"""
SECTIONS: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("storage", Storage, "Where everything is written. LAZYPIPE_HOME goes first, then `--root`, then this."),
    ("tokenize", TokenizeConfig, "Text in, token shards out."),
    ("tokenize.source, kind: embedded", EmbeddedSource, ""),
    ("tokenize.source, kind: files", FilesSource, "Relative paths are taken from the working directory."),
    ("tokenize.source, kind: hub", HubSource, ""),
    ("tokenize.tokenizer, kind: train", TrainTokenizer, ""),
    ("tokenize.tokenizer, kind: file", FileTokenizer, ""),
    ("tokenize.tokenizer, kind: hub", HubTokenizer, ""),
    (
        "tokenize.filters",
        Filters,
        "Counts of what is left out are metrics, facts, and columns of tables/sources: docs/tokenization.md.",
    ),
    ("model", ModelConfig, "A pre-norm decoder: RMSNorm, SwiGLU, RoPE. `lazypipe variants` lists mixers and patterns."),
    ("pretrain", PretrainConfig, "AdamW; what a step does: docs/pretraining.md."),
    ("evaluate", EvaluateConfig, "Held-out loss, continuations, and benchmarks (docs/evaluation.md)."),
    ("evaluate.extrapolation", ExtrapolationConfig, "Perplexity by context length and position: docs/probes.md."),
    ("evaluate.probes", ProbesConfig, "Retrieval probes: docs/probes.md."),
    ("sparsity", SparsityConfig, "The attention weights on held-out text."),
    ("report", ReportConfig, "The page that sets all variants side by side."),
    ("resources.pretrain", PretrainResources, "One worker without a GPU trains inside its stage task."),
    ("resources.tokenize, .evaluate, .sparsity, .report", StageResources, ""),
)


def reference() -> Iterator[str]:
    """The lines of the page."""
    yield HEAD
    for title, config, text in SECTIONS:
        yield f"## {title}\n"
        if text:
            yield f"{text}\n"
        yield "| field | type | default | meaning |"
        yield "|---|---|---|---|"
        for name, field in config.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                continue  # `model` inside PretrainConfig is the section of its own
            extra = field.json_schema_extra
            operational = isinstance(extra, dict) and extra.get("identity") is False
            meaning = f"{field.description}{' *(operational)*' if operational else ''}"
            default = "required" if field.is_required() else f"`{_shown(field.default)}`"
            yield f"| `{name}` | {_type(field.annotation)} | {default} | {meaning} |"
        yield ""


def _shown(value: object) -> str:
    if isinstance(value, BaseModel):
        return f"{{kind: {getattr(value, 'kind', '')}}}"
    if isinstance(value, tuple):
        return str(list(value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " \\| ".join(f"`{a}`" for a in arguments)
    if origin in (typing.Union, types.UnionType):
        if any(isinstance(a, type) and issubclass(a, BaseModel) for a in arguments):
            return "see below"
        return " or ".join("null" if a is type(None) else _type(a) for a in arguments)
    if origin is dict:
        return f"mapping to {_type(arguments[1])}"
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is typing.Annotated:
        return _type(arguments[0])
    return {"str": "text", "int": "integer", "float": "number", "bool": "true/false"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


if __name__ == "__main__":
    print("\n".join(reference()).rstrip())
