"""The learning rate at the corners of every schedule, and what holds for all of them."""

import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lazypipe.stages.pretrain.checks import warn_of_settings
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.optimizer import learning_rate

SCHEDULES = ("cosine", "wsd", "constant", "linear")


def rates(**fields: Any) -> list[float]:
    config = PretrainConfig.model_validate({"lr": 1.0, **fields})
    return [learning_rate(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_by_hand(schedule: str) -> None:
    found = rates(steps=110, warmup_steps=10, schedule=schedule)
    assert [found[step] for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])


def test_cosine_by_hand() -> None:
    found = rates(steps=110, warmup_steps=10, min_lr_fraction=0.1)
    expected = [1.0, 0.1 + 0.45 * (1 + math.cos(math.pi * 50 / 99)), 0.1]
    assert [found[step] for step in (10, 60, 109)] == pytest.approx(expected)


def test_linear_by_hand() -> None:
    found = rates(steps=111, warmup_steps=10, min_lr_fraction=0.2, schedule="linear")
    assert [found[step] for step in (10, 11, 60, 110)] == pytest.approx([1.0, 0.992, 0.6, 0.2])


def test_wsd_by_hand() -> None:
    found = rates(steps=100, warmup_steps=10, min_lr_fraction=0.0, schedule="wsd", decay_fraction=0.2)
    assert found[9:80] == [1.0] * 71
    assert [found[step] for step in (80, 81, 98, 99)] == pytest.approx([0.95, 0.9, 0.05, 0.0])
    assert rates(steps=3, warmup_steps=0, schedule="wsd", decay_fraction=0.01) == pytest.approx([1.0, 1.0, 0.1])
    assert rates(steps=4, warmup_steps=0, schedule="wsd", decay_fraction=1, min_lr_fraction=0) == pytest.approx(
        [0.75, 0.5, 0.25, 0.0]
    )


def test_a_wsd_run_before_its_decay_is_that_of_a_longer_one() -> None:
    short, long = (rates(steps=steps, warmup_steps=5, schedule="wsd") for steps in (50, 500))
    assert short[:40] == long[:40]


def test_constant_by_hand() -> None:
    assert rates(steps=20, warmup_steps=2, schedule="constant") == [0.5] + [1.0] * 19


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 300),
    st.integers(0, 400),
    st.floats(0, 1),
    st.floats(0, 1, exclude_min=True),
)
def test_every_schedule_rises_then_never_rises_again_and_ends_at_its_floor(
    schedule: str, steps: int, warmup: int, floor: float, decay: float
) -> None:
    fields = {"steps": steps, "warmup_steps": warmup, "min_lr_fraction": floor, "decay_fraction": decay}
    if schedule == "wsd" and warmup + max(1, round(decay * steps)) > steps:
        with pytest.raises(ValidationError, match="lower warmup_steps or decay_fraction"):
            rates(**fields, schedule=schedule)
        return
    found = rates(**fields, schedule=schedule)
    top = min(warmup, steps)
    assert all(a < b for a, b in pairwise([0.0, *found[:top]]))
    assert all(a >= b - 1e-12 for a, b in pairwise(found[top:]))
    lowest = 1.0 if schedule == "constant" else floor
    assert all(lowest - 1e-9 <= rate <= 1.0 for rate in found[top:])
    if steps - top > 1:
        assert found[-1] == pytest.approx(lowest)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"schedule": "cosine", "decay_fraction": 0.1}, "decay_fraction=0.1 has no effect with schedule=cosine"),
        ({"schedule": "constant", "min_lr_fraction": 0.0}, "min_lr_fraction=0 has no effect with schedule=constant"),
        (
            {"model": {"mixer": "retnet"}, "activation_checkpointing": "block"},
            "activation_checkpointing=block is for blocks of our own; mixer=retnet trains without",
        ),
        (
            {"model": {"mixer": "retnet"}, "compile": True, "document_masking": True},
            "compile=true is for blocks of our own; mixer=retnet trains without",
        ),
        (
            {"compile": True, "document_masking": True, "activation_checkpointing": "block"},
            "compile=true has no effect on layers of standard with document_masking and "
            "activation_checkpointing=block; leave out one of the three",
        ),
        (
            {
                "model": {"mixer": "lazy"},
                "compile": True,
                "document_masking": True,
                "activation_checkpointing": "block",
            },
            None,
        ),
        ({"schedule": "wsd", "decay_fraction": 0.1, "min_lr_fraction": 0.0}, None),
        ({}, None),
    ],
)
def test_a_setting_without_effect_is_said(fields: dict[str, Any], said: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_settings(PretrainConfig.model_validate(fields))
    assert [str(one.message) for one in caught] == ([said] if said else [])
