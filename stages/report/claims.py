"""Published claims put to our results. Each is computed; a claim that does not hold is told with its values.

"Near standard" is a perplexity at most 5 % above standard's, which five of the six published hybrids satisfy.
"Collapsed" is a loss at or above the unigram entropy: the model predicts no better than token frequencies do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lazypipe.stages.formats import loss

Key = tuple[str, str]  # (mixer, pattern)
NEAR = 1.05
STANDARD: Key = ("standard", "uniform")
FAIL: tuple[Key, ...] = (("mlp", "uniform"), ("gating", "uniform"))


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """nlu: mean accuracy (%). wikitext: perplexity. lambada: accuracy (%)."""

    mixer: str
    pattern: str
    nlu: float
    wikitext: float
    lambada: float


@dataclass(frozen=True, kw_only=True)
class OurModel:
    """Means over variants. Losses in nats; skip, skip_mixer: the losses of the ablations, None where not measured."""

    variants: list[str]
    validation_loss: float
    perplexity: float
    skip: float | None
    skip_mixer: float | None


Ours = Mapping[Key, OurModel]
Theirs = Mapping[Key, PublishedModel]


@dataclass(frozen=True)
class Claim:
    """holds: None when what it needs was not measured. numbers: the values behind it, in words."""

    claim: str
    holds: bool | None
    numbers: str


def claims(ours: Ours, theirs: Theirs, unigram_entropy: float | None) -> list[Claim]:
    """All claims, each with what our results say of it."""
    checks: list[tuple[str, Callable[[Ours, Theirs, float | None], tuple[bool | None, str]]]] = [
        ("Uniform mlp and gating are the worst", _worst),
        ("Hybrids are near standard where the published ones are", _hybrids_near),
        ("Every hybrid is better than its uniform model", _hybrids_better),
        ("Without its non-standard blocks a hybrid collapses", _skip_collapses),
        ("Lazy Attention is near standard", _lazy_near),
    ]
    return [Claim(name, *check(ours, theirs, unigram_entropy)) for name, check in checks]


def _worst(ours: Ours, theirs: Theirs, _: float | None) -> tuple[bool | None, str]:
    others = [key for key in ours if key in theirs and key not in FAIL]
    if not others or not all(key in ours for key in FAIL):
        return None, "It takes uniform mlp, uniform gating and others"
    worst = max(others, key=lambda key: ours[key].validation_loss)
    holds = all(ours[key].validation_loss > ours[worst].validation_loss for key in FAIL)
    shown = ", ".join(_loss_of(ours, key) for key in FAIL)
    return holds, f"{shown}; the highest of the {len(others)} others: {_loss_of(ours, worst)}"


def _hybrids_near(ours: Ours, theirs: Theirs, _: float | None) -> tuple[bool | None, str]:
    if STANDARD not in ours:
        return None, "There is no standard model"
    hybrids = [key for key in ours if key in theirs and key[1] != "uniform"]
    base = theirs[STANDARD].wikitext
    expected = [key for key in hybrids if theirs[key].wikitext <= NEAR * base]
    if not expected:
        return None, "No hybrid of the published ones that are near standard"
    far = [key for key in expected if _ratio(ours, key) > NEAR]
    shown = [f"{_name(key)} {_ratio(ours, key) - 1:+.1%} ({theirs[key].wikitext / base - 1:+.1%})" for key in hybrids]
    text = f"perplexity against standard here (published): {', '.join(shown)}; at most {NEAR - 1:.0%} counts as near"
    return not far, text + (f"; not near here: {', '.join(map(_name, far))}" if far else "")


def _hybrids_better(ours: Ours, theirs: Theirs, _: float | None) -> tuple[bool | None, str]:
    pairs = [(key, (key[0], "uniform")) for key in ours if key in theirs and key[1] != "uniform"]
    pairs = [(hybrid, uniform) for hybrid, uniform in pairs if uniform in ours]
    if not pairs:
        return None, "No mechanism is there both uniform and as a hybrid"
    gains = {hybrid: ours[uniform].validation_loss - ours[hybrid].validation_loss for hybrid, uniform in pairs}
    shown = ", ".join(f"{_name(key)} {gain:.3f}" for key, gain in gains.items())
    return all(gain > 0 for gain in gains.values()), f"nats below the uniform model: {shown}"


def _skip_collapses(ours: Ours, _: Theirs, unigram_entropy: float | None) -> tuple[bool | None, str]:
    measured = {key: (model, model.skip) for key, model in ours.items() if model.skip is not None}
    if not measured or unigram_entropy is None:
        return None, "evaluate.ablations: [skip] measures it"
    skipped = {key: skip for key, (model, skip) in measured.items() if model.validation_loss < unigram_entropy}
    if not skipped:
        return None, f"No hybrid is below the unigram entropy of {loss(unigram_entropy)} in the first place"
    shown = ", ".join(f"{_name(key)} {loss(value)}" for key, value in skipped.items())
    above = sum(value >= unigram_entropy for value in skipped.values())
    text = f"{above} of {len(skipped)} at or above the unigram entropy of {loss(unigram_entropy)}: {shown}"
    return above == len(skipped), text


def _lazy_near(ours: Ours, _: Theirs, __: float | None) -> tuple[bool | None, str]:
    key = ("lazy", "uniform")
    if STANDARD not in ours or key not in ours:
        return None, "It takes a uniform lazy and a standard model"
    ratio = _ratio(ours, key)
    text = f"{_loss_of(ours, key)}, {_loss_of(ours, STANDARD)}: perplexity {ratio - 1:+.1%}"
    return ratio <= NEAR, text


def _ratio(ours: Ours, key: Key) -> float:
    """Perplexity against standard's."""
    return math.exp(ours[key].validation_loss - ours[STANDARD].validation_loss)


def _name(key: Key) -> str:
    return key[0] if key[1] == "uniform" else f"{key[0]} {key[1]}"


def _loss_of(ours: Ours, key: Key) -> str:
    return f"{_name(key)} {loss(ours[key].validation_loss)}"
