"""The one style of all figures: arrays in, a matplotlib Figure out. No display, no global state.

Colours of Okabe and Ito (told apart under every common colour blindness) and a brown, names and units on the axes,
layers and heads numbered from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8C510A")
MANY = 6  # more models than this share their figures with fewer details
MARKERS = ("o", "s", "^", "D")
GREY = "#777777"


class Series(Protocol):
    """What is drawn of one model. family: what it has in common with others, its mixer."""

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str | None: ...


def series_styles(series: Sequence[Series]) -> list[dict[str, Any]]:
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


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches, outside of pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
