"""YAML 1.2 experiment documents: reading, `extends`, and `key=value` / `~key` overrides. Data in, data out."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from stages.contract import Refusal

Document = dict[str, Any]


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: '; did you mean 'lr'?' and the names there are."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} (known: {', '.join(names)})"


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML 1.2 document into plain dicts, lists and scalars."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise Refusal(f"{where}{line}: not valid YAML: {error.problem or error.context}") from error
    except YAMLError as error:
        raise Refusal(f"{where}: not valid YAML: {error}") from error


def dump_yaml(document: Document, path: Path) -> None:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(document, file)


def read_document(path: Path, _children: tuple[Path, ...] = ()) -> Document:
    """Read an experiment file; a parent named by `extends` (relative to the file) is merged below it."""
    resolved = path.expanduser().resolve()
    if resolved in _children:
        chain = " -> ".join(str(p) for p in (*_children, resolved))
        raise Refusal(f"{path}: 'extends' goes in a circle: {chain}; remove one of them")
    try:
        text = resolved.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Refusal(_missing(path, resolved)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: cannot be read as a UTF-8 YAML file: {error}") from error
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict):
        kind = "empty" if document is None else f"a {type(document).__name__}"
        raise Refusal(f"{path}: expected a mapping of sections (name, tokenize, model, variants, ...), found {kind}")
    parent = document.pop("extends", None)
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise Refusal(f"{path}: extends: expected the path of one parent file, found {parent!r}")
    return merge(read_document(resolved.parent / parent, (*_children, resolved)), document)


def _missing(path: Path, resolved: Path) -> str:
    siblings = sorted(p.name for p in resolved.parent.glob("*.y*ml")) if resolved.parent.is_dir() else []
    hint = nearest(resolved.name, siblings) if siblings else ""
    return f"{path}: no such experiment file{hint}"


def merge(parent: Document, child: Document) -> Document:
    """Deep merge: mappings are merged key by key, anything else in the child replaces the parent's."""
    merged = copy.deepcopy(parent)
    for key, value in child.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """Apply `a.b=value` (a YAML scalar or flow; a mapping replaces the whole mapping) and `~a.b` (delete), in order."""
    document = copy.deepcopy(document)
    for override in overrides:
        if override.startswith("~"):
            _delete(document, override)
            continue
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
            raise Refusal(
                f"override {override!r}: expected key=value such as pretrain.lr=1e-3, or ~key to delete; "
                "options such as --only start with two dashes"
            )
        *parents, last = key.split(".")
        here = document
        for depth, name in enumerate(parents):
            below = here.setdefault(name, {})
            if not isinstance(below, dict):
                above = ".".join(parents[: depth + 1])
                raise Refusal(
                    f"override {override!r}: {above} is {below!r}, not a mapping; nothing can be set below it"
                )
            here = below
        here[last] = _override_value(override, text)
    return document


def _override_value(override: str, text: str) -> Any:
    try:
        return parse_yaml(text, "value")
    except Refusal as refusal:
        hint = ""
        if "*" in text:
            hint = (
                "; a glob that starts with * must be quoted for YAML and the shell: 'tokenize.source.paths=[\"*.txt\"]'"
            )
        raise Refusal(f"override {override!r}: {refusal}{hint}") from refusal


def _delete(document: Document, override: str) -> None:
    *parents, last = override[1:].split(".")
    here: Any = document
    for name in parents:
        here = here.get(name) if isinstance(here, dict) else None
    if not isinstance(here, dict) or last not in here:
        known = here if isinstance(here, dict) else document
        raise Refusal(f"override {override!r}: there is no such key to delete{nearest(last, known)}")
    del here[last]
