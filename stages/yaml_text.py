"""YAML 1.2 text as plain values."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lazypipe.stages.contract import UserError

MAX_DEPTH = 32  # an experiment needs 4; an alias that contains itself has no end


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
        plain: dict[str, Any] = {}
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
