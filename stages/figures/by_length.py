"""Figures of length extrapolation and of the retrieval probes: a line per model, the trained length marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lazypipe.stages.figures.style import GREY, new_figure, series_style, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
TITLES = {
    "recall": "recall: random pairs",
    "needle": "needle in text, mean over depths",
    "induction": "induction: random tokens again",
    "copy": "copy: text again",
}


def extrapolation(tables: Mapping[str, tuple[Sequence[Row], Sequence[Row]]], trained_length: int | None) -> Figure:
    """Perplexity by context length (sliding windows dashed), and loss by position.

    tables: name -> rows of tables/extrapolation and of tables/positions. The band is one standard error wide each way.
    """
    from matplotlib.lines import Line2D

    figure = new_figure(11, 4.5)
    by_length, by_position = figure.subplots(1, 2)
    handles: list[Any] = []
    sliding_stride = None
    for index, (name, (rows, positions)) in enumerate(tables.items()):
        style = series_style(index)
        beside = [row for row in rows if row["stride"] == row["context_length"]]
        sliding = [row for row in rows if row["stride"] < row["context_length"]]
        by_length.plot(*_columns(beside, "context_length", "perplexity"), linewidth=1.8, markersize=5, **style)
        if sliding:
            sliding_stride = sliding[0]["stride"]
            points = _columns(sliding, "context_length", "perplexity")
            by_length.plot(*points, linestyle="--", linewidth=1.4, markersize=5, markerfacecolor="white", **style)
        chosen = steadiest(positions)
        middle = [(row["first_position"] * row["last_position"]) ** 0.5 for row in chosen]
        by_position.plot(middle, [row["loss"] for row in chosen], linewidth=1.8, markersize=4, **style)
        edges = [(row["loss"], row["loss_error"] or 0.0) for row in chosen]
        low, high = [loss - error for loss, error in edges], [loss + error for loss, error in edges]
        by_position.fill_between(middle, low, high, color=style["color"], alpha=0.15, linewidth=0)
        if name:
            handles.append(Line2D([], [], linewidth=1.8, markersize=5, label=name, **style))
    if sliding_stride is not None:
        handles.append(Line2D([], [], color=GREY, linewidth=1.8, label="windows side by side"))
        handles.append(Line2D([], [], color=GREY, linewidth=1.4, linestyle="--", label=f"sliding by {sliding_stride}"))
    by_length.set(title="Perplexity by context length", xlabel="context length (tokens)", ylabel="perplexity")
    by_position.set(
        title="Loss by position", xlabel="position in the window (tokens of context)", ylabel="loss (nats per token)"
    )
    for axes in (by_length, by_position):
        mark = _mark_trained(axes, trained_length)
        _logarithmic_lengths(axes)
    if mark is not None:
        handles.append(mark)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def steadiest(positions: Sequence[Row]) -> list[Row]:
    """Each bucket of the longest windows, from the shortest windows that have it: those are the most."""
    longest = max(row["context_length"] for row in positions)
    steadiest_rows: dict[tuple[int, int], Row] = {}
    for row in sorted(positions, key=lambda row: row["context_length"]):
        steadiest_rows.setdefault((row["first_position"], row["last_position"]), row)
    wanted = [row for row in positions if row["context_length"] == longest]
    buckets = [(row["first_position"], row["last_position"]) for row in wanted]
    return [steadiest_rows[bucket] for bucket in buckets if steadiest_rows[bucket]["loss"] is not None]


def probes(tables: Mapping[str, Sequence[Row]], trained_length: int | None) -> Figure:
    """Per probe a column: accuracy above, gain in nats below, by length; and the needle by depth, if it has several.

    tables: name -> rows of tables/probes. Bars are one standard error each way; dotted: accuracy in the control.
    """
    from matplotlib.lines import Line2D

    kinds = list(dict.fromkeys(row["probe"] for rows in tables.values() for row in rows))
    by_depth = len({row["depth"] for rows in tables.values() for row in rows if row["probe"] == "needle"}) > 1
    columns = len(kinds) + by_depth
    figure = new_figure(2.2 + 2.9 * columns, 5.6)
    panels = figure.subplots(2, columns, squeeze=False, sharex="col", sharey="row")
    handles: list[Any] = []
    mark = None
    for index, (name, rows) in enumerate(tables.items()):
        style = series_style(index)
        for column, kind in enumerate(kinds):
            chosen = [row for row in rows if row["probe"] == kind]
            if not chosen:
                continue  # variants may be probed differently
            for axes, value in zip(panels[:, column], ("accuracy", "gain"), strict=True):
                _line(axes, _by(chosen, "length", value), style)
            control = _by(chosen, "length", "control_accuracy")
            values = [mean for mean, _ in control.values()]
            panels[0, column].plot(list(control), values, color=style["color"], linestyle=":", linewidth=1.4)
        needles = [row for row in rows if row["probe"] == "needle"]
        if by_depth and needles:
            longest = max(row["length"] for row in needles)
            chosen = [row for row in needles if row["length"] == longest]
            for axes, value in zip(panels[:, -1], ("accuracy", "gain"), strict=True):
                _line(axes, _by(chosen, "depth", value), style)
            panels[0, -1].set_title(f"needle at {longest:,} tokens", fontsize=10)
        if name:
            handles.append(Line2D([], [], linewidth=1.8, markersize=5, label=name, **style))
    for column, kind in enumerate(kinds):
        panels[0, column].set_title(TITLES[kind], fontsize=10)
        panels[1, column].set_xlabel("length (tokens)")
        for axes in panels[:, column]:
            mark = _mark_trained(axes, trained_length)
        _logarithmic_lengths(panels[1, column])
    if by_depth:
        panels[1, -1].set_xlabel("depth (0 first, 1 last)")
    panels[0, 0].set_ylabel("accuracy")
    panels[1, 0].set_ylabel("gain over the\ncontrol (nats)")
    panels[0, 0].set_ylim(-0.03, 1.03)
    for axes in panels.flat:
        tidy(axes)
    for axes in panels[1]:
        axes.axhline(0, color=GREY, linewidth=0.8)
    handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.4, label="control"))
    if mark is not None:
        handles.append(mark)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _line(axes: Axes, points: Mapping[float, tuple[float, float]], style: Mapping[str, Any]) -> None:
    values, errors = zip(*points.values(), strict=True)
    axes.errorbar(list(points), values, yerr=errors, linewidth=1.6, markersize=4, elinewidth=0.8, **style)


def _by(rows: Sequence[Row], key: str, value: str) -> dict[float, tuple[float, float]]:
    """Mean and standard error of `value` by `key`; rows of one key (depths) are averaged."""
    points = {}
    for point in sorted({row[key] for row in rows}):
        group = [row for row in rows if row[key] == point]
        errors = [row.get(f"{value}_error") or 0.0 for row in group]
        mean = sum(row[value] for row in group) / len(group)
        # The depths share their texts: their errors are averaged as if they were one.
        points[point] = (mean, sum(errors) / len(group))
    return points


def _columns(rows: Sequence[Row], *names: str) -> list[list[Any]]:
    return [[row[name] for row in sorted(rows, key=lambda row: row[names[0]])] for name in names]


def _mark_trained(axes: Axes, trained_length: int | None) -> Any:
    """A dash-dotted line at the trained length, whose handle says so."""
    if trained_length is None:
        return None
    label = f"trained length, {trained_length:,}"
    return axes.axvline(trained_length, linestyle="-.", linewidth=1.0, color=GREY, label=label)


def _logarithmic_lengths(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    tidy(axes)
