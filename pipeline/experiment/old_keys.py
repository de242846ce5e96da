"""Experiment files written before a key got another name or place: read as they were meant, with a hint."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from lazypipe.pipeline.experiment.document import Document
from lazypipe.stages.config import StageConfig
from lazypipe.stages.contract import OldKeyWarning
from lazypipe.stages.registry import STAGE_CONFIGS


def with_new_keys(document: Document) -> Document:
    """The document with every key under the name it has now; an OldKeyWarning for each section that had an old one."""
    new = dict(document)
    for stage, config in STAGE_CONFIGS.items():
        section = document.get(stage)
        if isinstance(section, dict):
            new[stage] = _renamed(config, section, {}, stage)
    variants = document.get("variants")
    if isinstance(variants, dict):
        new["variants"] = {name: _renamed_in_variant(name, fields, new) for name, fields in variants.items()}
    return new


def _renamed_in_variant(name: str, fields: Any, document: Document) -> Any:
    """A variant with the new keys in the sections that it nests; `document` holds the sections of all variants."""
    if not isinstance(fields, dict):
        return fields
    new = dict(fields)
    for stage, config in STAGE_CONFIGS.items():
        section = document.get(stage)
        if isinstance(fields.get(stage), dict):
            shared = section if isinstance(section, dict) else {}
            new[stage] = _renamed(config, fields[stage], shared, f"variants.{name}.{stage}")
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
