"""`key=value` and `~key` overrides of nested settings.

`lazypipe run EXPERIMENT key=value` and `python -m lazypipe.stages.pretrain CONFIG key=value` read them alike.
ruamel.yaml is imported for a value only: the second command does without it where nothing is set.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from lazypipe.stages.contract import UserError, nearest


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=value` (a YAML scalar or flow; a mapping replaces the whole mapping) and `~a.b` (delete), in order."""
    document = copy.deepcopy(document)
    for override in overrides:
        if override.startswith("~"):
            _delete(document, override)
            continue
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
            raise UserError(
                f"override {override!r}: expected key=value such as pretrain.lr=1e-3, or ~key to delete; "
                "options such as --only start with two dashes"
            )
        *parents, last = key.split(".")
        here = document
        for depth, name in enumerate(parents):
            if here.get(name) is None:  # absent, or a section with nothing below its name
                here[name] = {}
            below = here[name]
            if not isinstance(below, dict):
                above = ".".join(parents[: depth + 1])
                raise UserError(
                    f"override {override!r}: {above} is {below!r}, not a mapping; nothing can be set below it"
                )
            here = below
        here[last] = _override_value(override, text)
    return document


def _override_value(override: str, text: str) -> Any:
    try:
        from lazypipe.stages.yaml_text import parse_yaml
    except ModuleNotFoundError as error:
        raise UserError(
            f"override {override!r}: values are read by ruamel.yaml, which is missing ({error}); pip install "
            "ruamel.yaml, or write the value into the file"
        ) from error
    try:
        return parse_yaml(text, "value")
    except UserError as refusal:
        hint = ""
        if "*" in text:
            hint = (
                "; a glob that starts with * must be quoted for YAML and the shell: 'tokenize.source.paths=[\"*.txt\"]'"
            )
        raise UserError(f"override {override!r}: {refusal}{hint}") from refusal


def _delete(document: dict[str, Any], override: str) -> None:
    *parents, last = override[1:].split(".")
    here: Any = document
    for name in parents:
        here = here.get(name) if isinstance(here, dict) else None
    if not isinstance(here, dict) or last not in here:
        known = here if isinstance(here, dict) else document
        raise UserError(f"override {override!r}: there is no such key to delete{nearest(last, known)}")
    del here[last]
