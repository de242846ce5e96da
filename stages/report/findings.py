"""What the results of a report say: one sentence per finding, computed from the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lazypipe.stages.formats import count, loss, perplexity, share, small, threshold
from lazypipe.stages.metrics import (
    BIAS_MOVED,
    PERPLEXITY,
    PERPLEXITY_AT,
    SINK,
    SPARSITY,
    TAU_MAX,
    TAU_MIN,
    TAU_MOVED,
    TOKENS_PER_S,
    UNTRAINED_SPARSITY,
    VALIDATION_LOSS,
)
from lazypipe.stages.report.comparison import order_sentence
from lazypipe.stages.report.contents import Finding, Report
from lazypipe.stages.report.rows import VariantRow, ranked
from lazypipe.stages.report.seeds import certainty

MAX_NAMES = 4  # a sentence that lists more names is not read


def findings(report: Report) -> tuple[Finding, ...]:
    """Findings about the rows of a report, the most important first. What was not measured has no sentence."""
    topics: list[tuple[str, Callable[[Report], str | None]]] = [
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
    sentences = [(topic, write(report)) for topic, write in topics]
    return tuple(Finding(topic, sentence) for topic, sentence in sentences if sentence)


def _loss(report: Report) -> str | None:
    order = ranked(report.rows, VALIDATION_LOSS.name)
    if not order:
        return None
    (best, low), (worst, high) = order[0], order[-1]
    lowest = loss(low)
    if len(order) == 1:
        return f"{best.variant} reaches a validation loss of {lowest} nats per token."
    ties = [row for row, value in order if loss(value) == lowest]
    if len(ties) > 1:
        return f"{_names(ties)} share the lowest validation loss, {lowest} nats per token."
    second, next_loss = order[1]
    text = (
        f"{best.variant} has the lowest validation loss, {lowest} nats per token: "
        f"{loss(next_loss - low)} below {second.variant}"
    )
    if len(order) > 2:
        text += f" and {loss(high - low)} below {worst.variant}, the highest"
    return text + "."


def _yardstick(report: Report) -> str | None:
    entropy = report.unigram_entropy
    order = ranked(report.rows, VALIDATION_LOSS.name)
    if entropy is None or not order:
        return None
    gains = [entropy - value for _, value in order if value < entropy]
    below, above = [row for row, value in order if value < entropy], [row for row, value in order if value >= entropy]
    text = f"Knowing only how frequent each token is gives {loss(entropy)} nats per token (the unigram entropy); "
    parts = []
    if below:
        least, most = loss(gains[-1]), loss(gains[0])
        who = _names(below) if len(below) == 1 or above else "all variants"
        parts.append(f"{who} {_are(below)} {least if least == most else f'{least} to {most}'} nats below")
    if above:
        parts.append(f"{_names(above)} {_are(above)} not below it and {_have(above)} learned less than that")
    return text + ", ".join(parts) + "."


def _sparsity(report: Report) -> str | None:
    order = ranked(report.rows, SPARSITY.name)[::-1]
    with_zeros = [(row, value) for row, value in order if value > 0]
    without = [row for row, value in order if value == 0]
    if not order:
        return None
    if not with_zeros:
        return f"No attention weight is exactly 0 in {_names(without)}."
    parts = []
    for row, value in with_zeros[:MAX_NAMES]:
        before = row.value(UNTRAINED_SPARSITY)
        baseline = "" if before is None else f" ({share(before)} before training)"
        parts.append(f"{share(value)} in {row.variant}{baseline}")
    if len(with_zeros) > MAX_NAMES:
        parts.append(f"less in {len(with_zeros) - MAX_NAMES} more")
    if without:
        parts.append(f"none in {_names(without)}")
    return "Attention weights that are exactly 0: " + ", ".join(parts) + "."


def _sink(report: Report) -> str | None:
    order = ranked(report.rows, SINK.name)
    if not order:
        return None
    (lowest, low), (highest, high) = order[0], order[-1]
    text = f"On average a query gives the first token of its window a weight of {small(low)} in {lowest.variant}"
    if len(order) == 1:
        return text + "."
    if small(low) == small(high):
        return text + ", and the same in every other variant."
    return text + f" (the lowest) and {small(high)} in {highest.variant} (the highest)."


def _longer_context(report: Report) -> str | None:
    keys = [key for key in report.columns if key.startswith(PERPLEXITY_AT.name)]
    if not keys:
        return None
    length = int(keys[-1].removeprefix(PERPLEXITY_AT.name))
    changes = []
    for row, value in ranked(report.rows, keys[-1]):
        trained = row.value(PERPLEXITY)
        if trained is not None:
            changes.append(f"{row.variant} {perplexity(value)} ({100 * (value / trained - 1):+.1f} %)")
    if not changes:
        return None
    text = f"Perplexity at {count(length)} tokens, beyond what the models are meant for, against the trained length: "
    listed = changes[:MAX_NAMES]
    if len(changes) > MAX_NAMES:
        listed[-1] = f"... {changes[-1]}"
    return text + ", ".join(listed) + "."


def _speed(report: Report) -> str | None:
    order = ranked(report.rows, TOKENS_PER_S.name)
    if len(order) < 2 or order[0][1] <= 0:
        return None
    (slowest, low), (fastest, high) = order[0], order[-1]
    if f"{high / low:.2f}" == "1.00":
        return f"All variants trained equally fast, at {count(high)} tokens per second."
    return (
        f"{fastest.variant} trained fastest, at {count(high)} tokens per second: "
        f"{high / low:.2f} times as fast as {slowest.variant}."
    )


def _size(report: Report) -> str | None:
    others = [
        (row.variant, row.parameters, row.parameters_difference)
        for row in report.rows
        if row.parameters is not None and row.parameters_difference and row.variant != report.reference
    ]
    if not others:
        return None
    others.sort(key=lambda other: abs(other[2]), reverse=True)
    parts = []
    for variant, parameters, more in others[:MAX_NAMES]:
        parts.append(f"{variant} {count(abs(more))} parameters ({100 * more / (parameters - more):+.2f} %) "
                     f"{'more' if more > 0 else 'fewer'}")  # fmt: skip
    return f"Against {report.reference}: " + ", ".join(parts) + "."


def _movement(report: Report) -> str | None:
    """An ablated Lazy Attention may have learned only one of the two."""
    moved = [row for row in report.rows if row.value(TAU_MOVED) is not None or row.value(BIAS_MOVED) is not None]
    if not moved:
        return None
    parts = []
    for row in sorted(moved, key=lambda row: row.value(TAU_MOVED) or 0.0, reverse=True)[:MAX_NAMES]:
        learned = []
        tau, lowest, highest = row.value(TAU_MOVED), row.value(TAU_MIN), row.value(TAU_MAX)
        if tau is not None and lowest is not None and highest is not None:
            moved_by = small if abs(lowest) >= 0.05 else threshold
            reach = f"to between {threshold(lowest)} and {threshold(highest)}"
            learned.append(f"τ moved by up to {moved_by(tau)} ({reach})")
        bias = row.value(BIAS_MOVED)
        if bias is not None:
            subject = "the distance bias" if learned else "the distance bias moved"
            learned.append(f"{subject} by up to {small(bias)}")
        parts.append(f"in {row.variant} {', '.join(learned)}")
    return "From their initial values, " + "; ".join(parts) + "."


def _published(report: Report) -> str | None:
    return None if report.published is None else order_sentence(report.published)


def _certainty(report: Report) -> str | None:
    if report.seeds is not None:
        return certainty(report.seeds)
    seeds = sorted({row.seed for row in report.rows if row.seed is not None})
    if not seeds or len(report.rows) < 2:
        return None
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    return f"Each variant was trained once ({which}): small differences may be chance."


def _names(rows: Sequence[VariantRow]) -> str:
    if len(rows) > MAX_NAMES:
        shown = ", ".join(row.variant for row in rows[: MAX_NAMES - 1])
        return f"{shown} and {len(rows) - MAX_NAMES + 1} more"
    names = [row.variant for row in rows]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _are(rows: Sequence[VariantRow]) -> str:
    return "is" if len(rows) == 1 else "are"


def _have(rows: Sequence[VariantRow]) -> str:
    return "has" if len(rows) == 1 else "have"
