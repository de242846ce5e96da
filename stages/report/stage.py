"""Report stage: every variant of an experiment side by side, as report.md, report.html and report.json.

Only reads what the stages before it wrote, so it needs neither torch nor a model.

    report.json   {title, reference, columns, rows (one per variant), unigram_entropy, seeds, published, findings,
                   provenance}; seeds and published are null unless there are several seeds, a comparison is asked for
    report.md     the page, its figures in figures/
    report.html   the same page in one file, figures embedded, no network needed
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lazypipe.model.mixers.registry import STANDARD
from lazypipe.stages.contract import Artifact, Context, Outputs
from lazypipe.stages.facts import ReportFacts
from lazypipe.stages.metrics import PERPLEXITY_AT, reported
from lazypipe.stages.report import benchmarks, probes, sections
from lazypipe.stages.report.comparison import beside_published
from lazypipe.stages.report.config import ReportConfig
from lazypipe.stages.report.contents import Report
from lazypipe.stages.report.figures import draw_variants
from lazypipe.stages.report.findings import findings
from lazypipe.stages.report.page import html_page, markdown_page
from lazypipe.stages.report.rows import Variant, read_table, variant_row, variants_of
from lazypipe.stages.report.seeds import seed_groups, seed_table
from lazypipe.stages.report.table import column_keys


def run(config: ReportConfig, inputs: Mapping[str, Artifact], context: Context) -> Outputs[ReportFacts]:
    """Compare all variants found in `inputs`: "tokenize", then pretrain/<v>, evaluate/<v>, sparsity/<v> of each.

    Raises ValueError when a variant lacks one of its three results, or when there is no variant.
    """
    variants = variants_of(inputs)
    report = make_report(config, inputs, variants)
    context.progress(1, 4, "parts")
    # Of a model trained with several seeds the figures show the first.
    first_seeds = {group.variants[0] for group in report.seeds.groups} if report.seeds else {v.name for v in variants}
    shown = [variant for variant in variants if variant.name in first_seeds]
    figures = draw_variants(shown, report.unigram_entropy, context)
    context.progress(2, 4, "parts")
    parts = page_parts(report, inputs, variants, context)
    parts |= {**figures, "figures": sections.copy_figures(shown, context.output_dir)}
    page = markdown_page(report, parts)
    context.progress(3, 4, "parts")
    (context.output_dir / "report.md").write_text(page, encoding="utf-8")
    (context.output_dir / "report.html").write_text(html_page(page, config.title, context.output_dir), encoding="utf-8")
    text = json.dumps(report.to_json(), indent=1, allow_nan=False)
    (context.output_dir / "report.json").write_text(text + "\n", encoding="utf-8")
    context.progress(4, 4, "parts")
    return Outputs(final_metrics(report, variants), ReportFacts([v.name for v in variants], report.reference))


def make_report(config: ReportConfig, inputs: Mapping[str, Artifact], variants: Sequence[Variant]) -> Report:
    """All of report.json."""
    report = comparison(config.title, inputs["tokenize"], variants)
    recipes = [variant.recipe for variant in variants]
    published = None
    if config.compare_with is not None:
        published = beside_published(config.compare_with, report.rows, recipes, report.unigram_entropy)
    report = replace(
        report,
        seeds=seed_table(seed_groups(report.rows, recipes), report.reference),
        published=published,
        provenance=sections.provenance(inputs),
    )
    return replace(report, findings=findings(report))


def comparison(title: str, tokenize: Artifact, variants: Sequence[Variant]) -> Report:
    """The rows and columns of a report. The reference is the first standard variant, else the first."""
    rows = [variant_row(variant) for variant in variants]
    reference = next((row for row in rows if row.mixer == STANDARD), rows[0])
    if reference.parameters is not None:
        base = reference.parameters
        rows = [
            row if row.parameters is None else replace(row, parameters_difference=row.parameters - base) for row in rows
        ]
    extrapolated = [
        int(line["context_length"])
        for variant in variants
        for line in read_table(variant.evaluate, "context_lengths")
        if line["extrapolation"]
    ]
    return Report(
        title=title,
        reference=reference.variant,
        columns=column_keys(rows, max(extrapolated, default=None)),
        rows=rows,
        unigram_entropy=tokenize.metrics.get("unigram_entropy"),
    )


def page_parts(
    report: Report, inputs: Mapping[str, Artifact], variants: Sequence[Variant], context: Context
) -> dict[str, Any]:
    """What only the page shows, by its name in the template. Draws the figures of probes.py."""
    return {
        "attention_windows": _distinct(
            f"{variant.attention.windows} windows of {variant.attention.seq_len} tokens" for variant in variants
        ),
        "devices": _distinct(
            f"{variant.training.device} with {variant.training.threads} threads" for variant in variants
        ),
        "ablations": sections.ablations(report.rows),
        "context_lengths": sections.context_lengths(variants),
        "benchmarks": benchmarks.benchmarks(variants),
        "continuations": sections.continuations(variants),
        "warnings": sections.warnings_of(inputs),
        **sections.settings(inputs["tokenize"], variants),
        **probes.sections(variants, context),
    }


def final_metrics(report: Report, variants: Sequence[Variant]) -> dict[str, float]:
    """<variant>/<metric> of every declared metric that is a column, of the longest context, and of every benchmark."""
    names = [metric.name for metric in reported()]
    names += [key for key in report.columns if key.startswith(PERPLEXITY_AT.name)]
    names += dict.fromkeys("/".join(key) for variant in variants for key in benchmarks.by_metric(variant))
    return {
        f"{row.variant}/{name}": float(value)
        for row in report.rows
        for name in names
        if (value := row.metrics.get(name)) is not None
    }


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))
