"""Experiment files written before a key got another name or place: read as they were meant, with a hint."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lazypipe.pipeline.experiment.document import Document
from lazypipe.stages.config import StageConfig
from lazypipe.stages.contract import OldKeyWarning
from lazypipe.stages.stage_row import StageRow


def with_new_keys(document: Document, rows: Sequence[StageRow]) -> Document:
    """The document with every key under the name it has now; an OldKeyWarning for each section that had an old one."""
    new = dict(document)
    for row in rows:
        section = document.get(row.name)
        if isinstance(section, dict):
            new[row.name] = _renamed(row.config, section, {}, row.name)
    variants = document.get("variants")
    if isinstance(variants, dict):
        new["variants"] = {name: _renamed_in_variant(name, fields, new, rows) for name, fields in variants.items()}
    return new


def _renamed_in_variant(name: str, fields: Any, document: Document, rows: Sequence[StageRow]) -> Any:
    """A variant with the new keys in the sections that it nests; `document` holds the sections of all variants."""
    if not isinstance(fields, dict):
        return fields
    new = dict(fields)
    for row in rows:
        section, own = document.get(row.name), fields.get(row.name)
        if isinstance(own, dict):
            shared = section if isinstance(section, dict) else {}
            new[row.name] = _renamed(row.config, own, shared, f"variants.{name}.{row.name}")
    return new


def _renamed(
    config: type[StageConfig], fields: Mapping[str, Any], section: Mapping[str, Any], where: str
) -> dict[str, Any]:
    old = [key for key in config.OLD_KEYS if _holds(fields, key)]
    if not old:
        return dict(fields)
    new = config.with_new_keys(fields, section)
    changed = {key: value for key, value in new.items() if key not in fields or value != fields[key]}
    names = ", ".join(f"{where}.{key} is now {where}.{config.OLD_KEYS[key]}" for key in old)
    spelling = json.dumps(changed, default=str).replace('"', "")
    warnings.warn(f"{names}; write {where}: {spelling}", OldKeyWarning, stacklevel=2)
    return new


def _holds(fields: Any, dotted: str) -> bool:
    key, dot, rest = dotted.partition(".")
    return isinstance(fields, Mapping) and key in fields and (not dot or _holds(fields[key], rest))
