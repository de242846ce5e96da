"""Figures: arrays in, a matplotlib Figure out. No display, no global state: a figure dies with its last reference.

One style for all: colours of Okabe and Ito (told apart under every common colour blindness) and a brown, names and
units on the axes, layers and heads numbered from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lazypipe.stages.report.table import threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8C510A")
MANY = 6  # more models than this share their figures with fewer details
MARKERS = ("o", "s", "^", "D")
GREY = "#777777"
EXACT_ZERO_COLOUR = "#dedede"
SMALLEST_SHOWN_WEIGHT = 1e-4


@dataclass(frozen=True)
class LayerSeries:
    """A quantity per layer and head of one model: `values` [layers, H]; `untrained` the same before training.

    family: what it has in common with others, its mixer; a family has one colour.
    """

    name: str
    values: Array
    untrained: Array | None = None
    family: str | None = None


@dataclass(frozen=True)
class LossCurve:
    """A training run: `loss` at each of `steps` (NaN where missing), and (step, loss) on validation text, in nats."""

    name: str
    steps: Array
    loss: Array
    validation: Sequence[tuple[int, float]] = field(default=())
    family: str | None = None


def series_styles(series: Sequence[LayerSeries] | Sequence[LossCurve]) -> list[dict[str, Any]]:
    """Colour, marker and line of each series: a colour per family, a marker for each of its members, then dashes.

    Series without a family are families of their own. From the ninth family on, colours return with other markers.
    """
    families = list(dict.fromkeys(one.family or one.name for one in series))
    members = dict.fromkeys(families, 0)
    styles = []
    for one in series:
        family = one.family or one.name
        index, member = families.index(family), members[family]
        members[family] += 1
        styles.append({**series_style(index, member), "linestyle": ("-", "--", "-.")[min(member, 2)]})
    return styles


def series_style(family: int, member: int = 0) -> dict[str, Any]:
    """Colour and marker of a family's member, both counted from 0."""
    marker = member + family // len(COLOURS)
    return {"color": COLOURS[family % len(COLOURS)], "marker": MARKERS[marker % len(MARKERS)]}


def height_for(entries: int) -> float:
    """Inches of a figure whose legend has so many lines."""
    return max(4.5, 0.4 + 0.2 * entries)


def sparsity_by_layer(series: Sequence[LayerSeries]) -> Figure:
    return by_layer(series, "Attention weights that are exactly 0", "sparsity (share of causal pairs)", top=1.0)


def sink_by_layer(series: Sequence[LayerSeries]) -> Figure:
    return by_layer(series, "Attention on the first token", "sink (mean weight)")


def by_layer(series: Sequence[LayerSeries], title: str, quantity: str, top: float | None = None) -> Figure:
    """Mean over heads by layer (line), the untrained model as a dotted line of its colour; the y axis ends at `top`.

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
        handles += axes.plot(layers, _mean_over_heads(one.values), linewidth=2, markersize=5, label=one.name, **style)
        if one.untrained is not None:
            mean = _mean_over_heads(one.untrained)
            axes.plot(layers, mean, linestyle=":", linewidth=1.6, color=style["color"])
    if show_heads:
        handles.append(Line2D([], [], color=GREY, marker="o", linestyle="", markersize=3.5, alpha=0.6, label="a head"))
    if any(one.untrained is not None for one in series):
        handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.6, label="before training"))
    axes.set(title=title, xlabel="layer", ylabel=quantity)
    highest = top or (axes.dataLim.y1 if np.isfinite(axes.dataLim.y1) else 0.0) or 1.0
    axes.set_ylim(-0.03 * highest, 1.05 * highest)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _tidy(axes)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


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
        _tidy(axes)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def attention_heat_map(weights: Array, layer: int, heads: Sequence[int], window_length: int) -> Figure:
    """Attention of some heads of one layer: `weights` [len(heads), T, T], the first T queries and keys of a window.

    Colour is log10 of the weight from 1e-4 to 1; exact zeros are grey, future keys white.
    """
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    shown = weights.shape[-1]
    columns = min(len(heads), 4)
    rows = -(-len(heads) // columns)
    figure = new_figure(1.5 + 3.0 * columns, 0.6 + 3.2 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    causal = np.tri(shown, dtype=bool)
    norm = LogNorm(SMALLEST_SHOWN_WEIGHT, 1.0)
    image: Any = None
    for panel in panels.flat[len(heads) :]:
        panel.set_axis_off()
    for head, matrix, axes in zip(heads, weights, panels.flat, strict=False):
        zero = np.ma.masked_where(~(causal & (matrix == 0)), np.ones_like(matrix))
        positive = np.ma.masked_where(~causal | (matrix == 0), matrix)
        axes.imshow(zero, cmap=ListedColormap([EXACT_ZERO_COLOUR]), interpolation="nearest")
        image = axes.imshow(positive, cmap="viridis", norm=norm, interpolation="nearest")
        axes.set_title(f"head {head}: {100 * np.mean(matrix[causal] == 0):.0f} % exactly 0", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("query position (tokens)")
    for axes in panels.flat[max(len(heads) - columns, 0) : len(heads)]:  # the lowest panel of each column
        axes.set_xlabel("key position (tokens)")
        axes.tick_params(labelbottom=True)
    part = "" if shown == window_length else f", first {shown} of {window_length} tokens"
    place = f"Layer {layer}: attention weights" if columns > 1 else f"Layer {layer}"
    figure.suptitle(f"{place}, first validation window{part}", fontsize=12)
    figure.colorbar(image, ax=panels, label="attention weight", extend="min", shrink=0.85, aspect=30)
    key = [Patch(facecolor=EXACT_ZERO_COLOUR, edgecolor=GREY, label="exactly 0")]
    key.append(Patch(facecolor="white", edgecolor=GREY, label="future"))
    panels.flat[0].legend(handles=key, loc="upper right", fontsize=8, framealpha=1)
    return figure


def tau_heat_map(tau: Array, tau_init: float, relative: bool = True) -> Figure:
    """tau [layers, H] around its initial value: white has not moved, red keeps more weights, blue cuts more.

    relative: the threshold is -tau/n, not -tau. Layers of NaN, which have no tau, are grey.
    """
    from matplotlib.ticker import MaxNLocator

    layers, heads = tau.shape
    figure = new_figure(min(3.6 + 0.75 * heads, 14), min(2.0 + 0.5 * layers, 14))
    axes = figure.add_subplot()
    reach = max(float(np.nanmax(np.abs(tau - tau_init))), 1e-6)
    image = axes.imshow(tau, cmap="RdBu_r", vmin=tau_init - reach, vmax=tau_init + reach, aspect="auto")
    if tau.size <= 400:
        for layer, head in np.argwhere(np.isfinite(tau)):
            strong = abs(tau[layer, head] - tau_init) > 0.6 * reach
            axes.text(
                head, layer, threshold(tau[layer, head]), ha="center", va="center", fontsize=8,
                color="white" if strong else "black",
            )  # fmt: skip
    axes.set_facecolor("0.85")
    initial = f"{tau_init:g}" if abs(tau_init) >= 0.05 else threshold(tau_init)
    axes.set_title(f"Learned τ, white: initial {initial}\nred: cuts less, blue: cuts more", fontsize=11)
    axes.set(xlabel="head", ylabel="layer (grey: no τ)" if np.isnan(tau).any() else "layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.colorbar(image, ax=axes, label=f"τ: weights below −τ{'/n' if relative else ''} are cut")
    return figure


def bias_curves(bias: Array) -> Figure:
    """Distance bias [layers, H, W]: a panel per layer, a line per head; distance grows logarithmically from 1.

    Layers of NaN, which have no bias, get no panel.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    learned = [layer for layer in range(len(bias)) if np.isfinite(bias[layer]).any()]
    layers, (heads, window) = len(learned), bias.shape[1:]
    columns = min(layers, 4 if layers <= 16 else 6)
    rows = -(-layers // columns)
    figure = new_figure(1.8 + 2.6 * columns, 0.9 + 2.3 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    colours = _head_colours(heads)
    distance = np.arange(window)
    for panel in panels.flat[layers:]:
        panel.set_axis_off()
    handles: list[Any] = []
    for layer, axes in zip(learned, panels.flat, strict=False):
        axes.axhline(0, color=GREY, linewidth=0.8)
        lines = [
            axes.plot(distance, curve, linewidth=1.1, color=colour, marker="o" if window == 1 else None)[0]
            for curve, colour in zip(bias[layer], colours, strict=True)
        ]
        handles = handles or lines
        # Near distances carry most of the bias; linear from 0 to 1 so that distance 0 has a place.
        axes.set_xscale("symlog", base=2, linthresh=1)
        ticks = [0, *(4**power for power in range(1 + int(np.log(max(window - 1, 1)) / np.log(4))))]
        axes.set_xticks(ticks)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(0, max(window - 1, 1))
        axes.set_title(f"layer {layer}", fontsize=10)
        _tidy(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel("bias (logits)")
    for axes in panels.flat[max(layers - columns, 0) : layers]:
        axes.set_xlabel("distance (tokens)")
        axes.tick_params(labelbottom=True)
    figure.suptitle("Learned distance bias", fontsize=12)
    shown = range(heads) if heads <= 16 else range(0, heads, -(-heads // 16))
    figure.legend(
        [handles[head] for head in shown], [f"head {head}" for head in shown], loc="outside right upper", frameon=False
    )
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


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches, outside of pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)


def _mean_over_heads(values: Array) -> Array:
    """[layers, H] -> [layers]; NaN heads are left out, a layer of NaN stays NaN."""
    known = np.isfinite(values)
    count = known.sum(axis=1)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=1) / np.maximum(count, 1), np.nan)


def _head_colours(heads: int) -> list[Any]:
    """Up to 7 heads take the qualitative colours, more heads shades from dark blue to yellow-green."""
    if heads <= len(COLOURS):
        return list(COLOURS[:heads])
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.9, heads)))
