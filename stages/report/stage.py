"""Report stage: every variant of an experiment side by side, as report.md, report.html and report.json.

Only reads what the stages before it wrote, so it needs neither torch nor a model.

    report.json   {title, reference, columns, rows (one per variant), unigram_entropy, seeds, published, findings,
                   provenance}; seeds and published are null unless there are several seeds, a comparison is asked for
    report.md     the page, its figures in figures/
    report.html   the same page in one file, figures embedded, no network needed
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lazypipe.stages import figures
from lazypipe.stages.contract import Artifact, Context, Outputs
from lazypipe.stages.facts import ReportFacts, SparsityFacts
from lazypipe.stages.report import benchmarks as report_benchmarks
from lazypipe.stages.report import probes as report_probes
from lazypipe.stages.report import sections as report_sections
from lazypipe.stages.report.comparison import beside_published
from lazypipe.stages.report.config import ReportConfig
from lazypipe.stages.report.findings import findings
from lazypipe.stages.report.page import html_page, markdown_page
from lazypipe.stages.report.sections import Variant, read_table
from lazypipe.stages.report.seeds import seed_groups, seed_table
from lazypipe.stages.report.table import PERPLEXITY_AT

METRICS = (
    "validation_loss",
    "perplexity",
    "bits_per_byte",
    "sparsity",
    "untrained_sparsity",
    "surviving_mass",
    "sink",
    "tokens_per_s",
)


def run(config: ReportConfig, inputs: Mapping[str, Artifact], context: Context) -> Outputs[ReportFacts]:
    """Compare all variants found in `inputs`: "tokenize", then pretrain/<v>, evaluate/<v>, sparsity/<v> of each.

    Raises ValueError when a variant lacks one of its three results, or when there is no variant.
    """
    tokenize, variants = inputs["tokenize"], variants_of(inputs)
    report = comparison(config.title, tokenize, variants)
    recipes = [recipe(variant) for variant in variants]
    report["seeds"] = seed_table(seed_groups(report["rows"], recipes), report["reference"])
    report["published"] = None
    if config.compare_with is not None:
        report["published"] = beside_published(config.compare_with, report["rows"], recipes, report["unigram_entropy"])
    report["findings"] = [finding._asdict() for finding in findings(report)]
    report["provenance"] = report_sections.provenance(inputs)
    context.progress(1, 4, "parts")

    # Of a model trained with several seeds the figures show the first.
    once = {group["variants"][0] for group in (report["seeds"] or {"groups": []})["groups"]}
    shown = [variant for variant in variants if not once or variant.name in once]
    draw(shown, report["unigram_entropy"], context)
    context.progress(2, 4, "parts")
    sections = {
        "attention_windows": _distinct(
            f"{variant.attention.windows} windows of {variant.attention.seq_len} tokens" for variant in variants
        ),
        "devices": _distinct(
            f"{variant.training.device} with {variant.training.threads} threads" for variant in variants
        ),
        "ablations": report_sections.ablations(report["rows"]),
        "context_lengths": report_sections.context_lengths(variants),
        "benchmarks": report_benchmarks.benchmarks(variants),
        "continuations": report_sections.continuations(variants),
        "figures": report_sections.copy_figures(shown, context.output_dir),
        "warnings": report_sections.warnings_of(inputs),
        **report_sections.settings(tokenize, variants),
        **report_probes.sections(variants, context),
    }
    page = markdown_page(report, sections)
    context.progress(3, 4, "parts")
    (context.output_dir / "report.md").write_text(page, encoding="utf-8")
    (context.output_dir / "report.html").write_text(html_page(page, config.title, context.output_dir), encoding="utf-8")
    text = json.dumps(report, indent=1, allow_nan=False)
    (context.output_dir / "report.json").write_text(text + "\n", encoding="utf-8")
    context.progress(4, 4, "parts")

    names = [*METRICS, *(key for key in report["columns"] if key.startswith(PERPLEXITY_AT))]
    names += dict.fromkeys("/".join(key) for variant in variants for key in report_benchmarks.by_metric(variant))
    metrics = {
        f"{row['variant']}/{name}": float(row[name])
        for row in report["rows"]
        for name in names
        if row.get(name) is not None
    }
    return Outputs(metrics, ReportFacts([variant.name for variant in variants], report["reference"]))


def variants_of(inputs: Mapping[str, Artifact]) -> list[Variant]:
    """The variants in the order of `inputs`."""
    names = list(dict.fromkeys(node.partition("/")[2] for node in inputs if "/" in node))
    missing = [
        f"{stage}/{name}"
        for name in names
        for stage in ("pretrain", "evaluate", "sparsity")
        if f"{stage}/{name}" not in inputs
    ]
    if missing or not names:
        raise ValueError(
            f"the report needs pretrain, evaluate and sparsity of at least one variant; missing: "
            f"{', '.join(missing) or 'all'}; given: {', '.join(inputs)}"
        )
    return [
        Variant(name, inputs[f"pretrain/{name}"], inputs[f"evaluate/{name}"], inputs[f"sparsity/{name}"])
        for name in names
    ]


def recipe(variant: Variant) -> Mapping[str, Any]:
    """What decides a variant's weights: the config of its training, its operational fields left out."""
    manifest = variant.pretrain.manifest
    found: Mapping[str, Any] = manifest["identity"] if "identity" in manifest else manifest.get("config", {})
    return found  # {} is the identity of nothing but defaults


def comparison(title: str, tokenize: Artifact, variants: Sequence[Variant]) -> dict[str, Any]:
    """report.json but for findings and provenance. The reference is the first standard variant, else the first."""
    rows = [variant_row(variant) for variant in variants]
    reference = next((row for row in rows if row["mixer"] == "standard"), rows[0])
    for row in rows:
        if row["parameters"] is not None and reference["parameters"] is not None:
            row["parameters_difference"] = row["parameters"] - reference["parameters"]
    extrapolated = {
        row["context_length"]
        for variant in variants
        for row in read_table(variant.evaluate, "context_lengths")
        if row["extrapolation"]
    }
    columns = ["variant", "mixer", "validation_loss", "perplexity", "bits_per_byte"]
    columns += [f"{PERPLEXITY_AT}{length}" for length in sorted(extrapolated)[-1:]]
    columns += ["sparsity", "untrained_sparsity", "near_zero", "surviving_mass", "sink", "tokens_per_s"]
    columns += [name for name in ("mfu", "peak_memory_gb") if any(row[name] is not None for row in rows)]
    columns.append("parameters")
    if len(rows) > 1:
        columns.append("parameters_difference")
    return {
        "title": title,
        "reference": reference["variant"],
        "columns": columns,
        "rows": rows,
        "unigram_entropy": tokenize.metrics.get("unigram_entropy"),
    }


def variant_row(variant: Variant) -> dict[str, Any]:
    """Every number of a variant that a report may compare; None where it was not measured or is not finite."""
    pretrain, evaluate, sparsity = variant.pretrain, variant.evaluate, variant.sparsity
    training, attention = variant.training, variant.attention
    config = pretrain.manifest.get("config", {})
    row: dict[str, Any] = {
        "variant": variant.name,
        "mixer": mixer_and_pattern(attention),
        "mixer_name": attention.mixer,
        "pattern": attention.pattern,
        "parameters": training.parameters,
        "non_embedding_parameters": training.non_embedding_parameters,
        "steps": training.steps,
        "tokens": training.tokens,
        "seed": config.get("seed"),
        "training_loss": pretrain.metrics.get("loss"),
        "tokens_per_s": pretrain.metrics.get("tokens_per_s"),
        "train_seconds": pretrain.metrics.get("train_seconds"),
        "mfu": pretrain.metrics.get("mfu"),
        "peak_memory_gb": pretrain.metrics.get("peak_memory_gb"),
        **evaluate.metrics,
        **{name: value for name, value in sparsity.metrics.items() if "/" not in name},
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def mixer_and_pattern(facts: SparsityFacts) -> str:
    """'lazy', or for a hybrid 'lazy, standard in even' and 'lazy, standard in 1 4'; of a standard model 'standard'."""
    if facts.mixer == "standard" or facts.pattern == "uniform":
        return facts.mixer
    pattern = facts.pattern if isinstance(facts.pattern, str) else " ".join(map(str, facts.pattern))
    return f"{facts.mixer}, standard in {pattern}"


def draw(variants: Sequence[Variant], unigram_entropy: float | None, context: Context) -> None:
    """The figures all variants share: figures/loss_curves, sparsity_by_layer, sink_by_layer."""
    context.log_figure(
        "loss_curves", figures.loss_curves([loss_curve(variant) for variant in variants], unigram_entropy)
    )
    heads = [(variant, read_table(variant.sparsity, "heads")) for variant in variants]
    for name, figure in (("sparsity", figures.sparsity_by_layer), ("sink", figures.sink_by_layer)):
        series = [
            figures.LayerSeries(
                variant.name,
                by_head(rows, name),
                by_head(rows, f"untrained_{name}"),
                variant.attention.mixer,
            )
            for variant, rows in heads
        ]
        context.log_figure(f"{name}_by_layer", figure(series))


def loss_curve(variant: Variant) -> figures.LossCurve:
    rows = read_table(variant.pretrain, "history")
    validation = [(row["step"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
    return figures.LossCurve(
        variant.name,
        np.array([row["step"] for row in rows], dtype=np.int64),
        np.array([row["loss"] for row in rows], dtype=np.float64),  # None becomes NaN
        validation,
        variant.attention.mixer,
    )


def by_head(rows: Sequence[Mapping[str, Any]], name: str) -> figures.Array:
    """A column of tables/heads as [layers, H]."""
    layers, heads = 1 + max(row["layer"] for row in rows), 1 + max(row["head"] for row in rows)
    values = np.full((layers, heads), np.nan)
    for row in rows:
        values[row["layer"], row["head"]] = np.nan if row[name] is None else row[name]
    return values


def _distinct(texts: Any) -> str:
    return ", ".join(dict.fromkeys(texts))
