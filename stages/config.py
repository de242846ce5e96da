"""What every stage's Config is made of. Imports no torch, so that planning an experiment stays instant.

A field made with `operational(...)` says how a stage runs and not what it computes (intervals, backends, file
locations): it is recorded in the manifest and left out of the recipe's fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


def operational(default: Any = ..., **keywords: Any) -> Any:
    """A pydantic Field that is not part of the stage's identity."""
    return Field(default, json_schema_extra={"identity": False}, **keywords)


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes


class StageConfig(BaseModel):
    """Base of all configs: frozen, unknown keys refused.

    STAGE_VERSION: part of a stage's recipe; raised when the same Config means another result.
    """

    STAGE_VERSION: ClassVar[int] = 1

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    OLD_KEYS: ClassVar[Mapping[str, str]] = {}  # dotted names that files may still use -> the names of today

    @classmethod
    def with_new_keys(cls, fields: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
        """A section's `fields` under the names of today; those with OLD_KEYS say how.

        section: of a variant's own fields, the section of all variants, already under the names of today; else empty.
        """
        del section
        return dict(fields)


def is_operational(field: FieldInfo) -> bool:
    """Whether a field of a config was made with `operational`."""
    extra = field.json_schema_extra
    return isinstance(extra, Mapping) and extra.get("identity") is False


def identity(config: BaseModel, defaults: bool = False) -> dict[str, Any]:
    """The part of a config that decides a result, nested as the config is: no operational fields and, unless
    `defaults`, none that equal their default.
    """
    kept: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if is_operational(field):
            continue
        if defaults or field.is_required() or not _same_identity(value, field.get_default(call_default_factory=True)):
            kept[name] = identity(value, defaults) if isinstance(value, BaseModel) else value
    return kept


def _same_identity(value: Any, default: Any) -> bool:
    if isinstance(value, BaseModel):
        return type(value) is type(default) and identity(value) == identity(default)
    return bool(value == default)


def operational_fields(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """The other part, by dotted names: how a stage runs and not what it computes."""
    kept: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if is_operational(field):
            kept[prefix + name] = value
        elif isinstance(value, BaseModel):
            kept |= operational_fields(value, f"{prefix}{name}.")
    return kept


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat
