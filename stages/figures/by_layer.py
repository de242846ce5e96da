"""A quantity of several models by layer and head, and what it was before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lazypipe.stages.figures.style import GREY, MANY, height_for, new_figure, series_styles, tidy
from lazypipe.stages.metrics import ByLayer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]


@dataclass(frozen=True)
class LayerSeries:
    """A quantity per layer and head of one model: `values` [layers, H]; `untrained` the same before training.

    family: what it has in common with others, its mixer; a family has one colour.
    """

    name: str
    values: Array
    untrained: Array | None = None
    family: str | None = None


def by_layer(series: Sequence[LayerSeries], about: ByLayer) -> Figure:
    """Mean over heads by layer (line), the untrained model as a dotted line of its colour; the y axis ends at the top.

    Up to six models also show every head as a dot; with more, the dots of one would hide those of another.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.5, height_for(len(series) + 2))
    axes = figure.add_subplot()
    handles = []
    show_heads = len(series) <= MANY
    for index, (one, style) in enumerate(zip(series, series_styles(series), strict=True)):
        layers = np.arange(len(one.values))
        if not np.isfinite(one.values).any():
            continue  # a model without attention weights; the others keep their colours
        shift = 0.06 * (index - (len(series) - 1) / 2)  # dots of several models stand side by side
        for head in range(one.values.shape[1] if show_heads else 0):
            dots = style | {"linestyle": ""}
            axes.plot(layers + shift, one.values[:, head], markersize=3.5, alpha=0.45, mew=0, **dots)
        handles += axes.plot(layers, mean_over_heads(one.values), linewidth=2, markersize=5, label=one.name, **style)
        if one.untrained is not None:
            mean = mean_over_heads(one.untrained)
            axes.plot(layers, mean, linestyle=":", linewidth=1.6, color=style["color"])
    if show_heads:
        handles.append(Line2D([], [], color=GREY, marker="o", linestyle="", markersize=3.5, alpha=0.6, label="a head"))
    if any(one.untrained is not None for one in series):
        handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.6, label="before training"))
    axes.set(title=about.title, xlabel="layer", ylabel=about.label)
    highest = about.top or (axes.dataLim.y1 if np.isfinite(axes.dataLim.y1) else 0.0) or 1.0
    axes.set_ylim(-0.03 * highest, 1.05 * highest)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    tidy(axes)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def mean_over_heads(values: Array) -> Array:
    """[layers, H] -> [layers]; NaN heads are left out, a layer of NaN stays NaN."""
    known = np.isfinite(values)
    count = known.sum(axis=1)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=1) / np.maximum(count, 1), np.nan)
