"""YAML 1.2 experiment documents: reading, `extends`, writing. Data in, data out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lazypipe.stages.contract import UserError, nearest
from lazypipe.stages.yaml_text import parse_yaml

Document = dict[str, Any]

EXPERIMENT_FILE = "experiment.yaml"  # its name in an MLflow run and in a job package


def dump_yaml(document: Document, path: Path) -> None:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(document, file)


def read_document(path: Path, _children: tuple[Path, ...] = ()) -> Document:
    """Read an experiment file; a parent named by `extends` (relative to the file) is merged below it."""
    try:
        resolved = path.expanduser().resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL character, an unknown ~user, a loop of links
        raise UserError(f"{str(path)!r}: not the path of an experiment file: {error}") from error
    if resolved in _children:
        chain = " -> ".join(str(p) for p in (*_children, resolved))
        raise UserError(f"{path}: 'extends' goes in a circle: {chain}; remove one of them")
    try:
        text = resolved.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(_missing(path, resolved, _children)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 YAML file: {error}") from error
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict):
        kind = "empty" if document is None else f"a {type(document).__name__}"
        raise UserError(f"{path}: expected a mapping of sections (name, tokenize, model, variants, ...), found {kind}")
    parent = document.pop("extends", None)
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends: expected the path of one parent file, found {parent!r}")
    parent_path = Path(parent) if parent.startswith("~") else resolved.parent / parent
    return merge(read_document(parent_path, (*_children, resolved)), document)


def _missing(path: Path, resolved: Path, children: tuple[Path, ...]) -> str:
    siblings = sorted(p.name for p in resolved.parent.glob("*.y*ml")) if resolved.parent.is_dir() else []
    hint = nearest(resolved.name, siblings) if siblings else ""
    named = f", which {children[-1]} extends" if children else ""
    return f"{path}: no such experiment file{named}{hint}"


def merge(parent: Document, child: Document) -> Document:
    """Deep merge: mappings are merged key by key, anything else in the child replaces the parent's."""
    merged = copy.deepcopy(parent)
    for key, value in child.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
