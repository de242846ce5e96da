"""Figures: what they draw, read back from the figure or from its pixels; and that odd shapes draw without complaint."""

import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lazypipe.stages.figures import style
from lazypipe.stages.figures.by_layer import LayerSeries, by_layer
from lazypipe.stages.metrics import SINK, SPARSITY
from lazypipe.stages.report.figures import LossCurve, loss_curves, smoothed
from lazypipe.stages.sparsity import figures

assert SPARSITY.by_layer is not None and SINK.by_layer is not None
SPARSITY_BY_LAYER, SINK_BY_LAYER = SPARSITY.by_layer, SINK.by_layer


def pixels(figure: Figure) -> np.ndarray:
    """Render without any warning; RGB values [height, width, 3] in 0 ... 1."""
    from matplotlib.image import imread

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(buffer, format="png", dpi=50)
    buffer.seek(0)
    return np.asarray(imread(buffer))[..., :3]


def share_of_colour(figure: Figure, colour: str) -> float:
    return float((np.abs(pixels(figure) - to_rgb(colour)).max(axis=-1) < 0.01).mean())


def test_exact_zeros_have_a_colour_of_their_own() -> None:
    dense = np.tri(32)[None] * 1e-7  # far below the colour scale, and yet not zero
    sparse = dense.copy()
    sparse[:, :, :16] = 0
    grey = [
        share_of_colour(figures.attention_heat_map(weights, 0, [0], 32), figures.EXACT_ZERO_COLOUR)
        for weights in (dense, sparse)
    ]
    assert grey[0] < 0.01 < 0.1 < grey[1]


def test_heat_map_names_layer_heads_share_of_zeros_and_part_of_the_window() -> None:
    weights = np.stack([np.tri(8), np.eye(8)])
    figure = figures.attention_heat_map(weights, 3, [0, 5], 1024)
    panels = figure.get_axes()
    assert panels[0].get_title() == "head 0: 0 % exactly 0"
    assert panels[1].get_title() == "head 5: 78 % exactly 0"  # 28 of 36 causal pairs
    assert "Layer 3" in figure.get_suptitle() and "first 8 of 1024 tokens" in figure.get_suptitle()
    assert panels[0].get_ylabel() == "query position (tokens)" and panels[1].get_xlabel() == "key position (tokens)"


def test_tau_map_is_centred_on_the_initial_value() -> None:
    figure = figures.tau_heat_map(np.array([[-1.0, -0.4], [-1.1, -0.9]]), tau_init=-1.0)
    image = figure.get_axes()[0].images[0]
    assert image.get_clim() == pytest.approx((-1.6, -0.4))
    assert {text.get_text() for text in figure.get_axes()[0].texts} == {"-1.000", "-0.400", "-1.100", "-0.900"}
    figure = figures.tau_heat_map(np.array([[-2.4e-4, -3.12e-4], [np.nan, np.nan]]), -1 / 4096, relative=False)
    axes = figure.get_axes()[0]
    assert [text.get_text() for text in axes.texts] == ["-0.00024", "-0.00031"]
    assert axes.get_ylabel() == "layer (grey: no τ)"


def test_layer_figure_draws_the_mean_over_heads_and_its_baseline() -> None:
    values = np.array([[0.2, 0.4], [0.6, np.nan], [np.nan, np.nan]])
    figure = by_layer([LayerSeries("lazy", values, np.full((3, 2), 0.5))], SPARSITY_BY_LAYER)
    lines = [line.get_ydata() for line in figure.get_axes()[0].lines]
    assert any(np.allclose(line, [0.3, 0.6, np.nan], equal_nan=True) for line in lines)
    assert any(np.allclose(line, 0.5) for line in lines)
    assert {"lazy", "a head", "before training"} == {text.get_text() for text in figure.legends[0].texts}


def test_loss_curves_mark_validation_and_the_unigram_entropy() -> None:
    steps = np.arange(1, 101)
    curve = LossCurve("lazy", steps, 7.0 - steps / 50, [(50, 6.0), (100, 5.0)])
    figure = loss_curves([curve], unigram_entropy=6.4)
    whole, late = figure.get_axes()
    marks = [np.asarray(line.get_ydata()) for line in whole.lines]
    assert any(np.allclose(mark, [6.0, 5.0]) for mark in marks if len(mark) == 2)
    assert any(np.allclose(line.get_ydata(), 6.4) for line in whole.lines)
    assert late.get_ylim()[0] < 5.0 and late.get_ylim()[1] > 6.0


@settings(max_examples=40, deadline=None)
@given(
    loss=st.lists(st.one_of(st.floats(-5, 20), st.just(float("nan"))), min_size=1, max_size=300),
    most_points=st.integers(2, 400),
)
def test_smoothing_is_the_mean_of_the_last_known_points(loss: list[float], most_points: int) -> None:
    steps = np.arange(len(loss)) * 3 + 1
    kept, smooth = smoothed(steps, np.array(loss), most_points)
    width = max(1, len(loss) // 50)
    assert kept[0] == 1 and kept[-1] == steps[-1] and len(kept) <= min(most_points, len(loss))
    for step, value in zip(kept, smooth, strict=True):
        index = (step - 1) // 3
        known = [v for v in loss[max(0, index + 1 - width) : index + 1] if not np.isnan(v)]
        np.testing.assert_allclose(value, np.mean(known) if known else np.nan, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.attention_heat_map(np.ones((1, 1, 1)), 0, [0], 1),
        lambda: figures.attention_heat_map(np.zeros((5, 3, 3)), 0, [0, 1, 2, 3, 4], 3),
        lambda: figures.tau_heat_map(np.full((1, 1), -1.0), -1.0),
        lambda: figures.tau_heat_map(np.linspace(-1, 0, 40 * 16).reshape(40, 16), -1.0),
        lambda: figures.bias_curves(np.zeros((1, 1, 1))),
        lambda: figures.bias_curves(np.ones((7, 20, 5))),
        lambda: by_layer([LayerSeries("standard", np.zeros((1, 1)))], SINK_BY_LAYER),
        lambda: by_layer([LayerSeries(f"v{i}", np.full((2, 2), i / 20)) for i in range(20)], SINK_BY_LAYER),
        lambda: loss_curves([], None),
        lambda: loss_curves([LossCurve("diverged", np.array([1]), np.array([np.nan]))], 6.0),
        lambda: loss_curves([LossCurve("empty", np.array([]), np.array([]))], 6.0),
    ],
)
def test_odd_shapes_draw_without_a_warning(draw: Callable[[], Figure]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw()
    assert pixels(figure).std() > 0


def test_variants_look_different_and_a_family_has_one_colour() -> None:
    def styles(families: list[str | None]) -> list[dict[str, Any]]:
        return style.series_styles(
            [LossCurve(str(i), np.array([]), np.array([]), family=f) for i, f in enumerate(families)]
        )

    assert len({tuple(style.values()) for style in styles([None] * 28)}) == 28
    hybrids = styles([*"abcdefgh", *"abcdefgh"])
    assert len({tuple(style.values()) for style in hybrids}) == 16
    assert [style["color"] for style in hybrids[:8]] == [style["color"] for style in hybrids[8:]]
    assert {style["linestyle"] for style in hybrids[:8]} == {"-"} and {s["linestyle"] for s in hybrids[8:]} == {"--"}


def test_drawing_touches_no_pyplot_state() -> None:
    code = (
        "import sys, numpy as np; from lazypipe.stages.sparsity import figures; "
        "figures.tau_heat_map(np.zeros((2, 2)), -1.0).savefig('/dev/null', format='png'); "
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
