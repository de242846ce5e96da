"""Which layers of a hybrid keep standard attention. Layers count from 1 here, as in the papers' tables.

The names are those of "Deconstructing Attention" (arXiv 2510.11602), whose table is for 24 layers; other depths take
the same fractions, a half or a quarter of the layers rounded to the nearest, halves up.
"""

from collections.abc import Sequence
from typing import Literal, get_args

PatternName = Literal["uniform", "even", "odd", "top", "middle", "bottom", "25%", "first", "last", "bilateral"]
Pattern = PatternName | tuple[int, ...]

PATTERNS: dict[str, str] = {
    "uniform": "no layer: the mixer in every one",
    "even": "layers 2, 4, 6, ...",
    "odd": "layers 1, 3, 5, ...",
    "top": "the first half",
    "middle": "the first and the last quarter: the mixer in the middle",
    "bottom": "the last half",
    "25%": "layers 4, 8, 12, ...",
    "first": "layer 1",
    "last": "the last layer",
    "bilateral": "layer 1 and the last layer",
}


def standard_layers(pattern: Pattern, num_layers: int) -> tuple[int, ...]:
    """The layers, 1 ... num_layers, that keep standard attention; the others get the mixer.

    Raises ValueError for a listed layer that is not there, is named twice, and for a pattern other than uniform that
    leaves one of the two kinds without a layer: it would be another model than its name says.
    """
    kept = _listed(pattern, num_layers) if isinstance(pattern, tuple) else _named(pattern, num_layers)
    if pattern != "uniform" and len(kept) in (0, num_layers):
        side = "no layer" if not kept else "every layer"
        raise ValueError(
            f"pattern={_shown(pattern)} keeps {side} of num_layers={num_layers} standard, which is no hybrid; choose "
            "another pattern or more layers, or write pattern: uniform"
        )
    return kept


def _listed(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    for layer in layers:
        if not 1 <= layer <= num_layers:
            raise ValueError(
                f"pattern={_shown(tuple(layers))} names layer {layer}; layers count from 1 to num_layers={num_layers}"
            )
    if len(set(layers)) < len(layers):
        raise ValueError(f"pattern={_shown(tuple(layers))} names a layer twice; name each standard layer once")
    return tuple(sorted(layers))


def _named(name: PatternName, num_layers: int) -> tuple[int, ...]:
    layers = range(1, num_layers + 1)
    half, quarter = (num_layers + 1) // 2, (num_layers + 2) // 4
    match name:
        case "uniform":
            return ()
        case "even":
            return tuple(layers[1::2])
        case "odd":
            return tuple(layers[::2])
        case "top":
            return tuple(layers[:half])
        case "middle":
            return tuple(layer for layer in layers if layer <= quarter or layer > num_layers - quarter)
        case "bottom":
            return tuple(layers[num_layers - half :])
        case "25%":
            return tuple(layers[3::4])
        case "first":
            return tuple(layers[:1])
        case "last":
            return tuple(layers[-1:])
        case "bilateral":
            return tuple(sorted({1, num_layers}))


def check_pattern_name(value: object) -> object:
    """`value` if it can be a pattern (lists as tuples), for pydantic; ValueError that lists the names otherwise."""
    if isinstance(value, list | tuple) and value and all(type(layer) is int for layer in value):
        return tuple(value)
    if isinstance(value, str) and value in get_args(PatternName):
        return value
    raise ValueError(
        f"must be one of {', '.join(get_args(PatternName))}, or a list of the layers that keep standard attention, "
        f"such as [1, 4]; found {value!r}"
    )


def _shown(pattern: Pattern) -> str:
    return str(list(pattern)) if isinstance(pattern, tuple) else pattern
