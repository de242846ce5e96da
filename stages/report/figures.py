"""The figures that the report draws of all variants together: their training runs, and their metrics by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lazypipe.stages import metrics
from lazypipe.stages.contract import Context
from lazypipe.stages.figures.by_layer import LayerSeries, by_layer
from lazypipe.stages.figures.listed import StageFigure
from lazypipe.stages.figures.style import GREY, MANY, height_for, new_figure, series_styles, tidy
from lazypipe.stages.report.rows import Variant, read_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]

LOSS_CURVES = StageFigure("loss_curves", "Training and validation loss of every variant over the optimizer steps")


def draw_variants(
    variants: Sequence[Variant], unigram_entropy: float | None, context: Context
) -> dict[str, StageFigure | list[StageFigure]]:
    """Draw them; returns {"loss_curves", "by_layer"} for the page."""
    curves = [loss_curve(variant) for variant in variants]
    context.log_figure(LOSS_CURVES.name, loss_curves(curves, unigram_entropy))
    heads = [(variant, read_table(variant.sparsity, "heads")) for variant in variants]
    drawn = []
    for metric in metrics.ATTENTION:
        if metric.by_layer is None or not any(metric.name in row for _, rows in heads for row in rows):
            continue  # a metric that is newer than all of these results
        series = [
            LayerSeries(
                variant.name,
                by_head(rows, metric.name),
                by_head(rows, f"untrained_{metric.name}"),
                variant.attention.mixer,
            )
            for variant, rows in heads
        ]
        drawn.append(StageFigure(f"{metric.name}_by_layer", metric.by_layer.caption))
        context.log_figure(drawn[-1].name, by_layer(series, metric.by_layer))
    return {"loss_curves": LOSS_CURVES, "by_layer": drawn}


def by_head(rows: Sequence[Mapping[str, Any]], name: str) -> Array:
    """A column of tables/heads as [layers, H]; NaN where it holds nothing, all of it without such a column."""
    layers, heads = 1 + max(row["layer"] for row in rows), 1 + max(row["head"] for row in rows)
    values = np.full((layers, heads), np.nan)
    for row in rows:
        values[row["layer"], row["head"]] = np.nan if row.get(name) is None else row[name]
    return values


def loss_curve(variant: Variant) -> LossCurve:
    """The training run of a variant from its tables/history."""
    rows = read_table(variant.pretrain, "history")
    validation = [(row["step"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
    return LossCurve(
        variant.name,
        np.array([row["step"] for row in rows], dtype=np.int64),
        np.array([row["loss"] for row in rows], dtype=np.float64),  # None becomes NaN
        validation,
        variant.attention.mixer,
    )


@dataclass(frozen=True)
class LossCurve:
    """A training run: `loss` at each of `steps` (NaN where missing), and (step, loss) on validation text, in nats."""

    name: str
    steps: Array
    loss: Array
    validation: Sequence[tuple[int, float]] = field(default=())
    family: str | None = None


def loss_curves(curves: Sequence[LossCurve], unigram_entropy: float | None) -> Figure:
    """Training loss (thin, smoothed) and validation loss (markers) of all runs: the whole run, and its second half.

    With more than six runs the second half shows validation losses only, where there are at least two in it.
    """
    from matplotlib.lines import Line2D

    figure = new_figure(11, height_for(len(curves) + 3))
    whole, late = figure.subplots(1, 2)
    last_step = max([1, *(int(curve.steps[-1]) for curve in curves if len(curve.steps))])
    lowest, highest = np.inf, -np.inf
    handles = []
    for curve, style in zip(curves, series_styles(curves), strict=True):
        steps, loss = smoothed(curve.steps, curve.loss)
        in_late = np.concatenate(
            [loss[steps >= last_step / 2], [value for step, value in curve.validation if step >= last_step / 2]]
        )
        lowest = min(lowest, np.nanmin(in_late, initial=np.inf))
        highest = max(highest, np.nanmax(in_late, initial=-np.inf))
        crowded = len(curves) > MANY and sum(step >= last_step / 2 for step, _ in curve.validation) > 1
        for axes in (whole, late):
            if axes is whole or not crowded:
                axes.plot(steps, loss, linewidth=0.9, alpha=0.7, color=style["color"])
            if curve.validation:
                axes.plot(*zip(*curve.validation, strict=True), linewidth=1.8, markersize=5, **style)
        handles.append(Line2D([], [], linewidth=1.8, markersize=5, label=curve.name, **style))
    handles.append(Line2D([], [], linewidth=0.9, color=GREY, label="training (smoothed)"))
    handles.append(Line2D([], [], linewidth=1.8, marker="o", markersize=5, color=GREY, label="validation"))
    if unigram_entropy is not None:
        for axes in (whole, late):
            axes.axhline(unigram_entropy, linestyle="--", linewidth=1.2, color=GREY)
        handles.append(Line2D([], [], linestyle="--", linewidth=1.2, color=GREY, label="unigram entropy"))
    whole.set(
        title="Loss, whole run", xlabel="optimizer step", ylabel="loss (nats per token)", xlim=(0, 1.02 * last_step)
    )
    late.set(title="Second half", xlabel="optimizer step", xlim=(0.49 * last_step, 1.01 * last_step))
    if lowest < highest:
        late.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.05 * (highest - lowest))
    for axes in (whole, late):
        tidy(axes)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def smoothed(steps: Array, loss: Array, most_points: int = 1000) -> tuple[Array, Array]:
    """Running mean over 2 % of the points (at least 1), missing values left out, thinned to about `most_points`.

    The first and the last point of the run are kept.
    """
    width = max(1, len(loss) // 50)
    known = np.isfinite(loss)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, loss, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    start = np.maximum(np.arange(len(loss)) + 1 - width, 0)
    end = np.arange(len(loss)) + 1
    count = counts[end] - counts[start]
    mean = np.where(count > 0, (sums[end] - sums[start]) / np.maximum(count, 1), np.nan)
    kept = np.unique(np.linspace(0, len(loss) - 1, min(len(loss), most_points)).round().astype(int))
    return steps[kept], mean[kept]
