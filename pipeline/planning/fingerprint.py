"""What a stage's result depends on: its recipe.

    fingerprint = sha256 of (stage, STAGE_VERSION, config without defaults and operational fields, source identity,
                             fingerprints of the inputs)

Fields equal to their default are left out, so that a new field invalidates nothing; changing a default bumps the
stage's STAGE_VERSION. Code, library versions and the device are not part of the identity: the manifest records them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any


def canonical(value: Any) -> str:
    """A stable JSON text of plain values; anything whose serialisation might change between runs is refused."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{value} has no stable serialisation; a recipe holds finite numbers only")
        return value + 0.0  # -0.0 is 0.0
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"a recipe's mapping has a key that is no string: {list(value)}")
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"a {type(value).__name__} ({value!r}) has no stable serialisation and cannot be part of a recipe")


def fingerprint(
    stage: str, version: int, config: Mapping[str, Any], source: Mapping[str, Any], inputs: Mapping[str, str]
) -> str:
    """sha256 (hex) of a recipe; `config` is an `identity`, `inputs` maps input names to fingerprints."""
    recipe = {"stage": stage, "version": version, "config": config, "source": source, "inputs": inputs}
    return hashlib.sha256(canonical(recipe).encode()).hexdigest()
