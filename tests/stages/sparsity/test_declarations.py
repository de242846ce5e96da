"""A metric is a declaration and a function, and so is a figure: tables, final metrics and the report follow."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazypipe.stages import metrics
from lazypipe.stages.contract import Artifact
from lazypipe.stages.figures import listed
from lazypipe.stages.figures.style import new_figure
from lazypipe.stages.formats import small
from lazypipe.stages.metrics import ByLayer, Metric
from lazypipe.stages.sparsity import figures as drawings
from lazypipe.stages.sparsity import metrics as measures
from lazypipe.stages.sparsity import stage as sparsity
from lazypipe.stages.sparsity.config import SparsityConfig
from lazypipe.stages.sparsity.measure import Measured
from lazypipe.stages.sparsity.metrics import Rows, Sums
from tests.stages.report.test_stage import run, stored, upstream
from tests.stages.tiny_experiment import context_in, pretrained, tokenized, trained_looking

CONFIG = SparsityConfig(windows=2, seq_len=32, heat_map_heads=0)


def measured_variant(folder: Path) -> dict[str, Artifact]:
    """A made-up experiment of one variant, whose attention the stage has measured."""
    inputs = upstream(folder, {"lazy": 4.3})
    context = context_in(folder / "measured")
    trained = pretrained(folder / "trained", trained_looking("lazy"))
    outputs = sparsity.run(CONFIG, {"tokenize": tokenized(folder / "corpus", 200), "pretrain": trained}, context)
    manifest = {"config": CONFIG.model_dump(), "facts": outputs.facts.to_json(), "metrics": outputs.metrics}
    return {**inputs, "sparsity/lazy": Artifact(context.output_dir, manifest)}


def test_every_declared_metric_has_its_function_and_every_figure_its_drawing() -> None:
    measured = {metric.name for metric in metrics.ATTENTION if not metric.untrained}
    assert measured == set(measures.MEASURES)
    assert set(listed.SPARSITY) == set(drawings.DRAWINGS)
    names = [metric.name for metric in (*metrics.EVALUATE, *metrics.ATTENTION, *metrics.LEARNED, *metrics.PRETRAIN)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_declared_metric_is_in_tables_final_metrics_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_layer: bool
) -> None:
    monkeypatch.setattr(metrics, "ATTENTION", [*metrics.ATTENTION])
    monkeypatch.setitem(measures.MEASURES, "self_weight", measures.MEASURES["sink"])  # taken out again at the end
    figure = ByLayer(title="Weight on itself", label="weight", caption="Weight on itself by layer")
    self_weight = metrics.declare(
        metrics.ATTENTION,
        Metric(
            name="self_weight",
            unit="1",
            description="weight of a query on its own position",
            write=small,
            heading="self weight",
            short="self",
            by_layer=figure if by_layer else None,
        ),
    )

    @measures.measures(self_weight)
    def on_itself(rows: Rows) -> Sums:
        start = rows.causal.shape[1] - rows.causal.shape[0]
        return rows.weights.diagonal(start, -2, -1).sum(-1), float(len(rows.causal))

    inputs = measured_variant(tmp_path)
    output = inputs["sparsity/lazy"].path
    heads = json.loads((output / "tables" / "heads.json").read_text())
    layers = json.loads((output / "tables" / "layers.json").read_text())
    assert all(0 < row["self_weight"] < 1 for row in (*heads, *layers))
    value = inputs["sparsity/lazy"].metrics["self_weight"]  # a final metric, which the pipeline logs to MLflow
    assert value == pytest.approx(sum(row["self_weight"] for row in heads) / len(heads))

    outputs, folder = run(tmp_path, inputs)
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "self weight" in stored_headings(page) and f" {small(value)} " in page
    assert stored(folder)["rows"][0]["self_weight"] == value == outputs.metrics["lazy/self_weight"]
    drawn = {path.stem for path in (folder / "figures").iterdir()}
    assert ("self_weight_by_layer" in drawn) == by_layer
    assert ("![Weight on itself by layer](figures/self_weight_by_layer.png)" in page) == by_layer
    assert (
        ("untrained_self_weight" in heads[0]) == ("self_weight/layer_1" in inputs["sparsity/lazy"].metrics) == by_layer
    )


def test_a_declared_figure_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed, "SPARSITY", listed.SPARSITY[:])
    blank = listed.declare(listed.SPARSITY, listed.StageFigure("blank_*", "nothing of layer {}"))
    monkeypatch.setitem(drawings.DRAWINGS, blank, drawings.thresholds)  # taken out again at the end

    @drawings.draws(blank)
    def draw(measured: Measured) -> Iterator[tuple[int, Any]]:
        yield from ((layer, new_figure(1, 1)) for layer in measured.attention_layers)

    inputs = measured_variant(tmp_path)
    _, folder = run(tmp_path, inputs)
    page = (folder / "report.md").read_text(encoding="utf-8")
    for layer in (0, 1):
        assert f"![lazy: nothing of layer {layer}](figures/lazy_blank_{layer}.png)" in page
        assert (folder / "figures" / f"lazy_blank_{layer}.png").is_file()


def stored_headings(page: str) -> list[str]:
    header = next(line for line in page.splitlines() if line.startswith("| variant | mixer |"))
    return [heading.strip() for heading in header.strip("|").split("|")]
