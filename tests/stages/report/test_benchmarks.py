"""The benchmark section of a report."""

from pathlib import Path
from typing import Any

from lazypipe.stages.contract import Artifact, Context
from lazypipe.stages.report import stage as report
from lazypipe.stages.report.benchmarks import benchmarks
from lazypipe.stages.report.config import ReportConfig
from lazypipe.stages.report.rows import Variant, variants_of
from tests.stages.report.test_stage import upstream
from tests.stages.tiny_experiment import context_in


def row(task: str, metric: str, value: float | None, stderr: float | None, higher: bool) -> dict[str, Any]:
    shared = {"documents": 1200, "num_fewshot": 0}
    return {"task": task, "metric": metric, "value": value, "stderr": stderr, "higher_is_better": higher, **shared}


def with_tasks(artifact: Artifact, rows: list[dict[str, Any]]) -> None:
    Context(artifact.path, artifact.path).log_table("tasks", rows)


def test_lines_best_values_and_the_mean(tmp_path: Path) -> None:
    inputs = upstream(tmp_path, {"lazy": 4.0, "standard": 4.1, "plain": 4.2})
    both = [row("wikitext", "word_perplexity", 40.0, None, False), row("piqa", "acc", 0.625, 0.01, True)]
    with_tasks(inputs["evaluate/lazy"], [*both, row("rte", "acc", 0.5, 0.03, True)])
    both = [row("wikitext", "word_perplexity", 50.0, None, False), row("piqa", "acc", 0.6, 0.01, True)]
    with_tasks(inputs["evaluate/standard"], [*both, row("rte", "acc", 0.5, 0.03, True)])
    variants = variants_of(inputs)
    lines = {(line["task"], line["metric"]): line for line in benchmarks(variants[:2])}
    assert lines["wikitext", "word_perplexity"]["cells"] == ["**40.00**", "50.00"]
    assert lines["piqa", "acc"]["cells"] == ["**62.5 % ± 1.0**", "60.0 % ± 1.0"]
    assert lines["rte", "acc"]["cells"] == ["50.0 % ± 3.0", "50.0 % ± 3.0"]  # a tie has no best
    assert lines["mean of 2 tasks", "acc"]["cells"] == ["**56.2 %**", "55.0 %"]
    assert lines["piqa", "acc"]["settings"] == "1,200 documents, 0-shot"
    # A variant that ran none of them has dashes, and there is no mean over tasks that only some ran.
    lines = {(line["task"], line["metric"]): line for line in benchmarks(variants)}
    assert lines["piqa", "acc"]["cells"][2] == "–" and ("mean of 2 tasks", "acc") not in lines


def test_the_page_has_the_table_only_where_there_are_benchmarks(tmp_path: Path) -> None:
    inputs = upstream(tmp_path, {"lazy": 4.0})
    context = context_in(tmp_path / "without")
    report.run(ReportConfig(), inputs, context)
    assert "## Benchmarks" not in (context.output_dir / "report.md").read_text(encoding="utf-8")
    with_tasks(inputs["evaluate/lazy"], [row("piqa", "acc", 0.625, 0.01, True)])
    inputs["evaluate/lazy"].manifest["metrics"]["piqa/acc"] = 0.625
    context = context_in(tmp_path / "with")
    outputs = report.run(ReportConfig(), inputs, context)
    page = (context.output_dir / "report.md").read_text(encoding="utf-8")
    assert "| piqa | acc | 1,200 documents, 0-shot | 62.5 % ± 1.0 |" in page
    assert outputs.metrics["lazy/piqa/acc"] == 0.625


def test_an_evaluation_without_benchmarks_has_no_lines(tmp_path: Path) -> None:
    variants: list[Variant] = variants_of(upstream(tmp_path, {"lazy": 4.0}))
    assert benchmarks(variants) == []
