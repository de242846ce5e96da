"""What the numbers of a report say: one sentence per finding, computed from the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lazypipe.stages.report.comparison import order_sentence
from lazypipe.stages.report.seeds import certainty
from lazypipe.stages.report.table import PERPLEXITY_AT, Row, count, loss, perplexity, share, small, threshold

MAX_NAMES = 4  # a sentence that lists more names is not read


class Finding(NamedTuple):
    topic: str
    sentence: str


def findings(report: Mapping[str, Any]) -> list[Finding]:
    """Findings about report["rows"] (see stages/report/stage.py), the most important first. No numbers, no sentence."""
    topics: list[tuple[str, Callable[[Mapping[str, Any]], str | None]]] = [
        ("Loss", _loss),
        ("Yardstick", _yardstick),
        ("Sparsity", _sparsity),
        ("Sink", _sink),
        ("Longer context", _longer_context),
        ("Speed", _speed),
        ("Size", _size),
        ("Learned thresholds", _movement),
        ("Published order", _published),
        ("Certainty", _certainty),
    ]
    found = [(topic, write(report)) for topic, write in topics]
    return [Finding(topic, sentence) for topic, sentence in found if sentence]


def _loss(report: Mapping[str, Any]) -> str | None:
    ranked = _ranked(report["rows"], "validation_loss")
    if not ranked:
        return None
    best, worst = ranked[0], ranked[-1]
    lowest = loss(best["validation_loss"])
    if len(ranked) == 1:
        return f"{_name(best)} reaches a validation loss of {lowest} nats per token."
    ties = [row for row in ranked if loss(row["validation_loss"]) == lowest]
    if len(ties) > 1:
        return f"{_names(ties)} share the lowest validation loss, {lowest} nats per token."
    second = ranked[1]
    text = (
        f"{_name(best)} has the lowest validation loss, {lowest} nats per token: "
        f"{loss(second['validation_loss'] - best['validation_loss'])} below {_name(second)}"
    )
    if len(ranked) > 2:
        text += f" and {loss(worst['validation_loss'] - best['validation_loss'])} below {_name(worst)}, the highest"
    return text + "."


def _yardstick(report: Mapping[str, Any]) -> str | None:
    entropy = report.get("unigram_entropy")
    ranked = _ranked(report["rows"], "validation_loss")
    if entropy is None or not ranked:
        return None
    below = [row for row in ranked if row["validation_loss"] < entropy]
    above = [row for row in ranked if row["validation_loss"] >= entropy]
    text = f"Knowing only how frequent each token is gives {loss(entropy)} nats per token (the unigram entropy); "
    parts = []
    if below:
        gains = [entropy - below[-1]["validation_loss"], entropy - below[0]["validation_loss"]]
        gain = loss(gains[0]) if loss(gains[0]) == loss(gains[1]) else f"{loss(gains[0])} to {loss(gains[1])}"
        who = _names(below) if len(below) == 1 or above else "all variants"
        parts.append(f"{who} {_are(below)} {gain} nats below")
    if above:
        parts.append(f"{_names(above)} {_are(above)} not below it and {_have(above)} learned less than that")
    return text + ", ".join(parts) + "."


def _sparsity(report: Mapping[str, Any]) -> str | None:
    ranked = _ranked(report["rows"], "sparsity")[::-1]
    with_zeros = [row for row in ranked if row["sparsity"] > 0]
    without = [row for row in ranked if row["sparsity"] == 0]
    if not ranked:
        return None
    if not with_zeros:
        return f"No attention weight is exactly 0 in {_names(without)}."
    parts = []
    for row in with_zeros[:MAX_NAMES]:
        before = row.get("untrained_sparsity")
        baseline = "" if before is None else f" ({share(before)} before training)"
        parts.append(f"{share(row['sparsity'])} in {_name(row)}{baseline}")
    if len(with_zeros) > MAX_NAMES:
        parts.append(f"less in {len(with_zeros) - MAX_NAMES} more")
    if without:
        parts.append(f"none in {_names(without)}")
    return "Attention weights that are exactly 0: " + ", ".join(parts) + "."


def _sink(report: Mapping[str, Any]) -> str | None:
    ranked = _ranked(report["rows"], "sink")
    if not ranked:
        return None
    lowest, highest = ranked[0], ranked[-1]
    text = (
        f"On average a query gives the first token of its window a weight of {small(lowest['sink'])} in {_name(lowest)}"
    )
    if len(ranked) == 1:
        return text + "."
    if small(lowest["sink"]) == small(highest["sink"]):
        return text + ", and the same in every other variant."
    return text + f" (the lowest) and {small(highest['sink'])} in {_name(highest)} (the highest)."


def _longer_context(report: Mapping[str, Any]) -> str | None:
    keys = [key for key in report["columns"] if key.startswith(PERPLEXITY_AT)]
    if not keys:
        return None
    key = keys[-1]
    length = int(key.removeprefix(PERPLEXITY_AT))
    ranked = [row for row in _ranked(report["rows"], key) if row.get("perplexity") is not None]
    if not ranked:
        return None

    def change(row: Row) -> str:
        return f"{_name(row)} {perplexity(row[key])} ({100 * (row[key] / row['perplexity'] - 1):+.1f} %)"

    text = f"Perplexity at {count(length)} tokens, beyond what the models are meant for, against the trained length: "
    listed = [change(row) for row in ranked[:MAX_NAMES]]
    if len(ranked) > MAX_NAMES:
        listed[-1] = f"... {change(ranked[-1])}"
    return text + ", ".join(listed) + "."


def _speed(report: Mapping[str, Any]) -> str | None:
    ranked = _ranked(report["rows"], "tokens_per_s")
    if len(ranked) < 2 or ranked[0]["tokens_per_s"] <= 0:
        return None
    slowest, fastest = ranked[0], ranked[-1]
    ratio = fastest["tokens_per_s"] / slowest["tokens_per_s"]
    if f"{ratio:.2f}" == "1.00":
        return f"All variants trained equally fast, at {count(fastest['tokens_per_s'])} tokens per second."
    return (
        f"{_name(fastest)} trained fastest, at {count(fastest['tokens_per_s'])} tokens per second: "
        f"{ratio:.2f} times as fast as {_name(slowest)}."
    )


def _size(report: Mapping[str, Any]) -> str | None:
    reference = report.get("reference")
    others = [row for row in report["rows"] if row.get("parameters_difference") and row["variant"] != reference]
    if not others:
        return None
    ranked = sorted(others, key=lambda row: abs(row["parameters_difference"]), reverse=True)
    parts = []
    for row in ranked[:MAX_NAMES]:
        more = row["parameters_difference"]
        base = row["parameters"] - more
        parts.append(f"{_name(row)} {count(abs(more))} parameters ({100 * more / base:+.2f} %) "
                     f"{'more' if more > 0 else 'fewer'}")  # fmt: skip
    return f"Against {reference}: " + ", ".join(parts) + "."


def _movement(report: Mapping[str, Any]) -> str | None:
    """An ablated Lazy Attention may have learned only one of the two."""
    moved = [row for row in report["rows"] if row.get("tau_moved") is not None or row.get("bias_moved") is not None]
    if not moved:
        return None
    ranked = sorted(moved, key=lambda row: row.get("tau_moved") or 0.0, reverse=True)
    parts = []
    for row in ranked[:MAX_NAMES]:
        learned = []
        if row.get("tau_moved") is not None:
            reach = f"to between {threshold(row['tau_min'])} and {threshold(row['tau_max'])}"
            moved_by = small if abs(row["tau_min"]) >= 0.05 else threshold
            learned.append(f"τ moved by up to {moved_by(row['tau_moved'])} ({reach})")
        if row.get("bias_moved") is not None:
            subject = "the distance bias" if learned else "the distance bias moved"
            learned.append(f"{subject} by up to {small(row['bias_moved'])}")
        parts.append(f"in {_name(row)} {', '.join(learned)}")
    return "From their initial values, " + "; ".join(parts) + "."


def _published(report: Mapping[str, Any]) -> str | None:
    return order_sentence(report["published"]) if report.get("published") else None


def _certainty(report: Mapping[str, Any]) -> str | None:
    if report.get("seeds"):
        return certainty(report["seeds"])
    seeds = sorted({row["seed"] for row in report["rows"] if row.get("seed") is not None})
    if not seeds or len(report["rows"]) < 2:
        return None
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    return f"Each variant was trained once ({which}): small differences may be chance."


def _ranked(rows: Sequence[Row], key: str) -> list[Row]:
    """The rows that have the number, lowest first; ties keep the order of the experiment."""
    return sorted((row for row in rows if row.get(key) is not None), key=lambda row: float(row[key]))


def _name(row: Row) -> str:
    return str(row["variant"])


def _names(rows: Sequence[Row]) -> str:
    if len(rows) > MAX_NAMES:
        return f"{', '.join(_name(row) for row in rows[: MAX_NAMES - 1])} and {len(rows) - MAX_NAMES + 1} more"
    names = [_name(row) for row in rows]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _are(rows: Sequence[Row]) -> str:
    return "is" if len(rows) == 1 else "are"


def _have(rows: Sequence[Row]) -> str:
    return "has" if len(rows) == 1 else "have"
