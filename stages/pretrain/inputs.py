"""What `python -m lazypipe.stages.pretrain` is given, read and checked: a config in JSON, and a tokenize result."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from lazypipe.model.config import ModelConfig
from lazypipe.stages.contract import UserError
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.files import files_problem
from lazypipe.stages.pretrain.config import PretrainConfig


def read_config(path: Path, overrides: Sequence[str]) -> PretrainConfig:
    """The PretrainConfig in a JSON file, with `a.b=value` set in it; a value is JSON, or else text."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON: {error}; write it with  lazypipe plan EXPERIMENT --print pretrain/VARIANT"
        ) from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected the fields of a pretrain config, found {type(fields).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: expected key=value such as lr=1e-3 or model.num_layers=2")
        *parents, last = key.split(".")
        here = fields
        for name in parents:
            here = here.setdefault(name, {})
            if not isinstance(here, dict):
                raise UserError(
                    f"override {override!r}: {name} is {here!r}, not a mapping; nothing can be set below it"
                )
        try:
            here[last] = json.loads(text)
        except ValueError:
            here[last] = text
    try:
        return PretrainConfig.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] != "extra_forbidden":
        return f"{key}: {first['msg'].replace('Input should be', 'must be')}, found {first['input']!r}"
    model: type[BaseModel] = ModelConfig if key.startswith("model.") else PretrainConfig
    close = difflib.get_close_matches(str(first["loc"][-1]), model.model_fields, n=1, cutoff=0.5)
    return f"{key}: unknown key" + (f"; did you mean '{close[0]}'?" if close else "; leave it out")


def verified_corpus(path: Path) -> Path:
    """The directory of an intact tokenize result; UserError says what is wrong with another."""
    hint = "make it with  lazypipe run EXPERIMENT --only tokenize  and give its folder, store/tokenize/..."
    current = path / "current"
    try:
        directory = path / current.read_text(encoding="utf-8").strip() if current.is_file() else path
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        stage, files = manifest["stage"], dict(manifest["files"])
        facts = manifest["facts"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--tokens {path}: holds no result ({type(error).__name__}: {error}); {hint}") from error
    if stage != "tokenize":
        raise UserError(f"--tokens {path}: is a result of {stage}, not of tokenize; {hint}")
    TokenizeFacts.from_json(facts, f"--tokens {path}: its facts")
    problem = files_problem(directory, files)
    if problem is not None:
        raise UserError(f"--tokens {path}: {problem}; {hint}")
    return directory
