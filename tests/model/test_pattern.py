"""Layer patterns against the paper's table for 24 layers, and their fractions at other depths."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lazypipe.model.config import ModelConfig
from lazypipe.model.pattern import PATTERNS, standard_layers
from lazypipe.model.transformer import Transformer

TABLE = {
    "uniform": set(),
    "even": {2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24},
    "odd": {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23},
    "top": set(range(1, 13)),
    "middle": {1, 2, 3, 4, 5, 6, 19, 20, 21, 22, 23, 24},
    "bottom": set(range(13, 25)),
    "25%": {4, 8, 12, 16, 20, 24},
    "first": {1},
    "last": {24},
    "bilateral": {1, 24},
}

NAMES: tuple[Any, ...] = tuple(PATTERNS)


def test_24_layers_are_the_papers_table() -> None:
    assert TABLE.keys() == PATTERNS.keys()
    assert {name: set(standard_layers(name, 24)) for name in NAMES} == TABLE


@given(st.integers(8, 100))
def test_other_depths_keep_the_fractions(depth: int) -> None:
    kept = {name: set(standard_layers(name, depth)) for name in NAMES}
    assert kept["even"] | kept["odd"] == set(range(1, depth + 1)) and not kept["even"] & kept["odd"]
    assert 1 in kept["top"] and depth in kept["bottom"]
    assert kept["top"] | kept["bottom"] == set(range(1, depth + 1))
    for name, layers in TABLE.items():
        assert abs(len(kept[name]) - len(layers) / 24 * depth) <= 1 or name in ("first", "last", "bilateral"), name
    mirrored = {depth + 1 - layer for layer in kept["middle"]}
    assert mirrored == kept["middle"]
    assert (len(kept["first"]), len(kept["last"]), len(kept["bilateral"])) == (1, 1, 2)


def test_small_depths() -> None:
    assert standard_layers("middle", 4) == (1, 4) and standard_layers("middle", 6) == (1, 2, 5, 6)
    assert standard_layers("top", 2) == (1,) and standard_layers("bottom", 2) == (2,)
    assert standard_layers("25%", 6) == (4,) and standard_layers("uniform", 1) == ()
    assert standard_layers((4, 1), 4) == (1, 4)


@pytest.mark.parametrize(
    ("pattern", "depth", "message"),
    [
        ("25%", 3, "keeps no layer of num_layers=3"),
        ("bilateral", 2, "keeps every layer of num_layers=2"),
        ((1, 2), 2, "keeps every layer"),
        ((1, 5), 4, "names layer 5; layers count from 1 to num_layers=4"),
        ((2, 2), 4, "names a layer twice"),
    ],
)
def test_a_pattern_that_makes_no_hybrid_is_refused(pattern: object, depth: int, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({"num_layers": depth, "pattern": pattern})


@pytest.mark.parametrize("pattern", ["evn", [], [1.0], [True], 3, None])
def test_what_is_no_pattern_is_told_the_names(pattern: object) -> None:
    with pytest.raises(ValidationError, match=r"must be one of uniform, even, odd, .* such as"):
        ModelConfig.model_validate({"pattern": pattern})


def test_the_model_has_the_mixers_of_its_pattern() -> None:
    config = ModelConfig(num_layers=4, mixer="lazy", pattern=(3,))
    assert config.layer_mixers == ("lazy", "lazy", "standard", "lazy")
    kinds = [type(layer.mixer).__name__ for layer in Transformer(config, 11).layers]
    assert kinds == ["LazyAttention", "LazyAttention", "StandardAttention", "LazyAttention"]
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
