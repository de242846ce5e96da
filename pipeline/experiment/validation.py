"""One mistake in a section of an experiment file, said in one sentence: which key, what was found, what is expected."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lazypipe.stages.contract import UserError, nearest

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def check(
    model: type[AnyModel], fields: Mapping[str, Any], where: str, own: Mapping[str, str] | None = None
) -> AnyModel:
    """Validate strictly (no '1' for 1, no true for 1); the first mistake becomes a UserError.

    `own` maps dotted keys to the place the user wrote them (a variant's flat key instead of the section's).
    """
    check_keys(model, fields, where)
    try:
        return model.model_validate_json(json.dumps(dict(fields), default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in _without_tags(first["loc"], fields)]
        message = first["msg"].removeprefix("Value error, ")
        key = _written_at(where, path, message, own or {})
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] == "missing":
            raise UserError(f"{key}: is required and missing{more}") from error
        if first["type"] == "union_tag_not_found":
            raise UserError(
                f"{key}.kind: is required and missing; choose one of {_kinds(model, path)}{more}"
            ) from error
        if first["type"] == "union_tag_invalid":
            tag = first["ctx"]["tag"]
            raise UserError(f"{key}.kind: {tag!r} is not one of {_kinds(model, path)}{more}") from error
        if first["type"] == "value_error":
            raise UserError(f"{key}: {message}{more}") from error
        raise UserError(f"{key}: {_in_yaml_terms(first)}, found {first['input']!r}{more}") from error


def _written_at(where: str, path: Sequence[str], message: str, own: Mapping[str, str]) -> str:
    """The place to correct: a check across fields (empty path) names the variant's keys that are in its message."""
    if path:
        key = ".".join([where, *path])
        return own.get(key) or next((own[k] + key[len(k) :] for k in own if key.startswith(f"{k}.")), key)
    places = [place for key, place in own.items() if re.search(rf"\b{key.rpartition('.')[2]}=", message)]
    return ", ".join(places) or where


def _in_yaml_terms(error: Any) -> str:
    if error["type"] == "too_short":
        return f"must have at least {error['ctx']['min_length']} item"
    message = str(error["msg"]).replace("Input should be", "must be").replace("String should", "must")
    return message.replace("an object", "a mapping").replace("a valid array", "a list")


def _kinds(model: type[BaseModel], path: Sequence[str]) -> str:
    members = typing.get_args(model.model_fields[path[0]].annotation)
    return ", ".join(repr(kind) for m in members for kind in typing.get_args(m.model_fields["kind"].annotation))


def _without_tags(location: Sequence[str | int], fields: Mapping[str, Any]) -> list[str | int]:
    """Drop the union tags pydantic puts into an error's location ('source', 'files', 'paths' -> 'source', 'paths')."""
    path: list[str | int] = []
    here: Any = fields
    for part in location:
        if isinstance(here, Mapping) and part not in here and here.get("kind") == part:
            continue
        path.append(part)
        here = here.get(part) if isinstance(here, Mapping) else None
    return path


def check_keys(model: type[BaseModel], fields: Mapping[str, Any], where: str) -> None:
    """Refuse unknown keys, at any depth, with the nearest known name."""
    for key, value in fields.items():
        field = model.model_fields.get(str(key))
        if field is None:
            raise UserError(f"{where}.{key}: unknown key{nearest(str(key), model.model_fields)}")
        if isinstance(value, Mapping):
            below = _nested_model(field.annotation, value)
            if below is not None:
                check_keys(below, value, f"{where}.{key}")


def _nested_model(annotation: Any, value: Mapping[str, Any]) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            if isinstance(member, type) and issubclass(member, BaseModel):
                kind = member.model_fields.get("kind")
                if kind is not None and value.get("kind") in typing.get_args(kind.annotation):
                    return member
    return None
