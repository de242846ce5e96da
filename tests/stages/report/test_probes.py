"""What a report says about longer contexts and retrieval, of variants that were measured and of those that were not."""

from pathlib import Path
from typing import Any

from lazypipe.stages.contract import Artifact, Context
from lazypipe.stages.figures import by_length
from tests.stages.report.test_stage import run, upstream

ROWS = [(64, 64, False, 80.0), (256, 256, False, 70.0), (256, 64, False, 68.0), (512, 512, True, 91.0)]


def with_probes(evaluated: Artifact, shift: float) -> None:
    """Made-up tables beside those of `upstream`."""
    context = Context(evaluated.path, evaluated.path)
    rows = [
        {"context_length": length, "stride": stride, "extrapolation": beyond, "perplexity": value + shift, "loss": 4.0}
        for length, stride, beyond, value in ROWS
    ]
    context.log_table("extrapolation", rows)
    buckets = [(64, 1, 1), (64, 2, 64), (512, 1, 1), (512, 2, 64), (512, 65, 512)]
    context.log_table(
        "positions",
        [
            {"context_length": n, "first_position": a, "last_position": b, "loss": 5.0 + n / 1000, "loss_error": 0.1}
            for n, a, b in buckets
        ],
    )
    cells: list[tuple[str, int, float | None]] = [("needle", 64, 0.0), ("needle", 64, 1.0), ("copy", 512, None)]
    context.log_table(
        "probes",
        [
            {
                "probe": probe,
                "length": length,
                "depth": depth,
                "extrapolation": length > 256,
                "accuracy": 0.5 + (depth or 0) / 2,
                "accuracy_error": 0.01,
                "control_accuracy": 0.25,
                "gain": 1.5 + shift,
                "gain_error": None if depth is None else 0.02 + depth / 50,
            }
            for probe, length, depth in cells
        ],
    )


def test_variants_stand_beside_each_other_and_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    inputs = upstream(tmp_path, {"lazy": 4.31, "standard": 4.42, "lazy_long": 4.5})
    with_probes(inputs["evaluate/lazy"], 0.0)
    with_probes(inputs["evaluate/standard"], 1.25)
    _, folder = run(tmp_path, inputs)
    page = (folder / "report.md").read_text(encoding="utf-8")
    for line in (
        "| 64 | side by side | 80.00 | 81.25 | – |",
        "| 256 | side by side | 70.00 | 71.25 | – |",
        "| 256 | sliding by 64 | 68.00 | 69.25 | – |",
        "| 512 | side by side | 91.00 † | 92.25 † | – |",
        "| needle | 64 | 75.0 % (25.0 %), +1.500 ± 0.030 | 75.0 % (25.0 %), +2.750 ± 0.030 | – |",
        "| copy | 512 | 50.0 % (25.0 %), +1.500 † | 50.0 % (25.0 %), +2.750 † | – |",
    ):
        assert line in page.splitlines()
    for name in ("extrapolation", "probes"):
        assert f"(figures/{name}.png)" in page and (folder / "figures" / f"{name}.png").stat().st_size > 10_000
    assert (folder / "report.html").read_text(encoding="utf-8").count("data:image/png") >= 5


def test_a_report_without_them_does_not_speak_of_them(tmp_path: Path) -> None:
    _, folder = run(tmp_path, upstream(tmp_path, {"lazy": 4.31}))
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "Length extrapolation" not in page and "Retrieval" not in page
    assert not (folder / "figures" / "probes.png").exists()


def test_the_steadiest_row_of_a_bucket_is_that_of_the_shortest_windows() -> None:
    rows: list[dict[str, Any]] = [
        {"context_length": length, "first_position": first, "last_position": last, "loss": loss}
        for length, first, last, loss in [
            (8, 1, 4, 1.0),
            (8, 5, 8, 2.0),
            (10, 1, 4, 3.0),
            (10, 5, 8, None),
            (10, 9, 10, 4.0),
        ]
    ]
    assert [row["loss"] for row in by_length.steadiest(rows)] == [1.0, 2.0, 4.0]
    assert [row["loss"] for row in by_length.steadiest(rows[:2])] == [1.0, 2.0]


def test_the_figure_draws_every_model_probe_and_depth() -> None:
    def row(probe: str, length: int, depth: float | None, accuracy: float) -> dict[str, Any]:
        return {
            "probe": probe,
            "length": length,
            "depth": depth,
            "accuracy": accuracy,
            "control_accuracy": 0.1,
            "gain": 2 * accuracy,
        }

    tables = {
        name: [row("needle", n, depth, depth / 2 + shift) for n in (32, 64) for depth in (0.0, 1.0)]
        + [row("copy", n, None, 0.5 + shift) for n in (32, 64)]
        for name, shift in (("lazy", 0.0), ("standard", 0.25))
    }
    tables["short"] = [row("copy", 32, None, 1.0)]  # probed differently
    figure = by_length.probes(tables, 32)
    panels = figure.get_axes()
    assert [axes.get_title() for axes in panels[:3]] == [
        "needle in text, mean over depths",
        "copy: text again",
        "needle at 64 tokens",
    ]
    by_depth: Any = panels[2].containers
    assert [container.lines[0].get_ydata().tolist() for container in by_depth] == [[0.0, 0.5], [0.25, 0.75]]
    mean: Any = panels[0].containers
    assert [container.lines[0].get_ydata().tolist() for container in mean] == [[0.25, 0.25], [0.5, 0.5]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "lazy",
        "standard",
        "short",
        "control",
        "trained length, 32",
    ]
