"""Figures of one model's attention: maps of weights, learned thresholds, learned distance biases.

A new figure is a declaration in stages/figures/listed.py and a function here with `@draws` on it; the report shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lazypipe.stages.figures.listed import ATTENTION_LAYERS, BIAS_CURVES, TAU_HEAT_MAP, StageFigure
from lazypipe.stages.figures.style import COLOURS, GREY, new_figure, tidy
from lazypipe.stages.formats import threshold

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lazypipe.stages.sparsity.measure import Measured  # imports torch

Array = NDArray[Any]

EXACT_ZERO_COLOUR = "#dedede"
SMALLEST_SHOWN_WEIGHT = 1e-4

Drawn = Iterator[tuple[int, Any]]  # (number, matplotlib Figure): number of the layer, or 0 where there are no several
DRAWINGS: dict[StageFigure, Callable[[Measured], Drawn]] = {}


def draws(figure: StageFigure) -> Callable[[Callable[[Measured], Drawn]], Callable[[Measured], Drawn]]:
    """Let the function below draw a declared figure."""

    def register(draw: Callable[[Measured], Drawn]) -> Callable[[Measured], Drawn]:
        DRAWINGS[figure] = draw
        return draw

    return register


@draws(TAU_HEAT_MAP)
def thresholds(measured: Measured) -> Drawn:
    if measured.taus is not None:
        relative = measured.model.lazy_threshold == "relative"
        yield 0, tau_heat_map(measured.taus, measured.model.tau_init, relative)


@draws(BIAS_CURVES)
def biases(measured: Measured) -> Drawn:
    if measured.biases is not None:
        yield 0, bias_curves(measured.biases)


@draws(ATTENTION_LAYERS)
def attention_maps(measured: Measured) -> Drawn:
    for layer in measured.attention_layers if measured.heads else ():
        yield layer, attention_heat_map(measured.maps[layer], layer, measured.heads, measured.seq_len)


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
        tidy(axes)
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


def _head_colours(heads: int) -> list[Any]:
    """Up to 7 heads take the qualitative colours, more heads shades from dark blue to yellow-green."""
    if heads <= len(COLOURS):
        return list(COLOURS[:heads])
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.9, heads)))
