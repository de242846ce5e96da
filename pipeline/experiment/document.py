"""YAML 1.2 experiment documents: reading, `extends`, and `key=value` / `~key` overrides. Data in, data out."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lazypipe.stages.contract import UserError

Document = dict[str, Any]

EXPERIMENT_FILE = "experiment.yaml"  # its name in an MLflow run and in a job package

MAX_DEPTH = 32  # an experiment needs 4; an alias that contains itself has no end


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: '; did you mean 'lr'?' and the names there are."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} (known: {', '.join(names)})"


class _Constructor(SafeConstructor):
    """YAML 1.2's core schema has no timestamps: 2026-01-01 is text."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML 1.2 document into dicts with text keys, lists, text, numbers, booleans and None."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        value = yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem or error.context}") from error
    except RecursionError:
        raise UserError(f"{where}: nested more than {MAX_DEPTH} levels deep; an experiment needs 4") from None
    # ruamel.yaml lets the errors of its own constructors through, for example for '!!int x' or 5000 digits
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not valid YAML: {str(error).partition(chr(10))[0]}") from error
    return _plain(value, where)


def _plain(value: Any, where: str, path: tuple[str, ...] = ()) -> Any:
    """The value with text keys; what YAML can say and an experiment cannot hold is refused."""
    here = f"{where}: {'.'.join(path)}: " if path else f"{where}: "
    if len(path) > MAX_DEPTH:
        raise UserError(
            f"{where}: {'.'.join(path[:3])}...: nested more than {MAX_DEPTH} levels deep, "
            "or an alias (*name) that contains itself"
        )
    if isinstance(value, dict):
        plain: Document = {}
        for key, item in value.items():
            name = str(key) if isinstance(key, int) and not isinstance(key, bool) else key
            if not isinstance(name, str):
                raise UserError(f"{here}the key {key!r} is not text; write it in quotes")
            if name in plain:
                raise UserError(f"{here}the key {name!r} is given twice, with and without quotes; remove one")
            plain[name] = _plain(item, where, (*path, name))
        return plain
    if isinstance(value, list):
        return [_plain(item, where, (*path, str(index))) for index, item in enumerate(value)]
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{here}{value!r} holds half of a surrogate pair, which is no character; correct the escape")
    if isinstance(value, int) and value.bit_length() > 63:
        raise UserError(f"{here}an integer of {value.bit_length()} bits; integers here have at most 63")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(
        f"{here}a YAML {type(value).__name__} has no meaning here; write text, a number, a list or a mapping"
    )


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


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
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
        return parse_yaml(text, "value")
    except UserError as refusal:
        hint = ""
        if "*" in text:
            hint = (
                "; a glob that starts with * must be quoted for YAML and the shell: 'tokenize.source.paths=[\"*.txt\"]'"
            )
        raise UserError(f"override {override!r}: {refusal}{hint}") from refusal


def _delete(document: Document, override: str) -> None:
    *parents, last = override[1:].split(".")
    here: Any = document
    for name in parents:
        here = here.get(name) if isinstance(here, dict) else None
    if not isinstance(here, dict) or last not in here:
        known = here if isinstance(here, dict) else document
        raise UserError(f"override {override!r}: there is no such key to delete{nearest(last, known)}")
    del here[last]
