"""The page docs/configuration.md: `python -m lazypipe.pipeline.experiment.reference > docs/configuration.md`."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator

from pydantic import BaseModel

from lazypipe.pipeline.experiment.resources import StageResources, WorkerResources
from lazypipe.pipeline.experiment.schema import Storage
from lazypipe.stages.registry import STAGES
from lazypipe.stages.stage_row import Section

HEAD = """# The experiment file, field by field

Made from the code by `python -m lazypipe.pipeline.experiment.reference > docs/configuration.md`; a test keeps it true.

Top level: `name` (of the experiment; also its MLflow experiment), `seed` (of training and evaluation; nothing in
tokenization is random), `extends` (one parent file, merged below this one), and the sections below. `variants` maps a
name (`[a-z0-9_]+`) to fields of `model` and `pretrain`, written flat; `evaluate: {...}` may nest there.

Fields marked *operational* say how a stage runs and not what it computes: changing them recomputes nothing.
"""
SECTIONS = (
    Section("storage", Storage, "Where everything is written. LAZYPIPE_HOME goes first, then `--root`, then this."),
    *(section for row in STAGES for section in row.sections),
    *(
        Section(f"resources.{row.name}", WorkerResources, "One worker without a GPU trains inside its stage task.")
        for row in STAGES
        if row.on_workers
    ),
    Section("resources." + ", .".join(row.name for row in STAGES if not row.on_workers), StageResources, ""),
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
            extra = extra if isinstance(extra, dict) else {}
            operational = extra.get("identity") is False
            choices = extra.get("choices")
            kind = _choices(choices) if isinstance(choices, list) else _type(field.annotation)
            meaning = f"{field.description}{' *(operational)*' if operational else ''}"
            default = "required" if field.is_required() else f"`{_shown(field.default)}`"
            yield f"| `{name}` | {kind} | {default} | {meaning} |"
        yield ""


def _shown(value: object) -> str:
    if isinstance(value, BaseModel):
        return f"{{kind: {getattr(value, 'kind', '')}}}"
    if isinstance(value, tuple):
        return str(list(value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _choices(values: Iterable[object]) -> str:
    return " \\| ".join(f"`{value}`" for value in values)


def _type(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return _choices(arguments)
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
