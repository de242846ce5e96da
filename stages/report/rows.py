"""A variant's results, and the row of report.json that they become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, Self

from lazypipe.model.mixers.registry import STANDARD
from lazypipe.stages.contract import Artifact
from lazypipe.stages.facts import EvaluateFacts, Pattern, PretrainFacts, SparsityFacts
from lazypipe.stages.metrics import PRETRAIN, TRAINING_LOSS, Metric


class Variant(NamedTuple):
    """One variant's results."""

    name: str
    pretrain: Artifact
    evaluate: Artifact
    sparsity: Artifact

    @property
    def training(self) -> PretrainFacts:
        return PretrainFacts.read(self.pretrain.manifest)

    @property
    def evaluation(self) -> EvaluateFacts:
        return EvaluateFacts.read(self.evaluate.manifest)

    @property
    def attention(self) -> SparsityFacts:
        return SparsityFacts.read(self.sparsity.manifest)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What decides the weights: the config of the training without its operational fields.

        {} is that of nothing but defaults.
        """
        manifest = self.pretrain.manifest
        recipe: Mapping[str, Any] = manifest["identity"] if "identity" in manifest else manifest.get("config", {})
        return recipe


def variants_of(inputs: Mapping[str, Artifact]) -> list[Variant]:
    """The variants in the order of `inputs`; ValueError when there is none, or one lacks a result."""
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


def read_table(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    """Rows of tables/<name>.parquet of a stage."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(artifact.path / "tables" / f"{name}.parquet").to_pylist()
    return rows


def has_table(artifact: Artifact, name: str) -> bool:
    return (artifact.path / "tables" / f"{name}.parquet").is_file()


@dataclass(frozen=True, kw_only=True)
class VariantRow:
    """What a report compares of a variant; None where it was not measured or is not finite.

    mixer: with the pattern of a hybrid, as in "mlp, standard in even". metrics: final metrics of its stages by name.
    parameters_difference: to the reference variant.
    """

    variant: str
    mixer: str | None = None
    mixer_name: str | None = None
    pattern: Pattern = "uniform"
    parameters: int | None = None
    non_embedding_parameters: int | None = None
    steps: int | None = None
    tokens: int | None = None
    seed: int | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    parameters_difference: int | None = None

    def value(self, metric: Metric) -> float | None:
        return self.metrics.get(metric.name)

    def to_json(self) -> dict[str, Any]:
        """As in report.json: the metrics stand beside the rest; a difference that is not known is left out."""
        row = asdict(self)
        metrics = row.pop("metrics")
        if row["parameters_difference"] is None:
            del row["parameters_difference"]
        return {**row, **metrics}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        own = {one.name for one in fields(cls)} - {"metrics"}
        metrics = {name: value for name, value in row.items() if name not in own}
        return cls(**{name: row[name] for name in own & row.keys()}, metrics=metrics)


def variant_row(variant: Variant) -> VariantRow:
    """The row of a variant, without its difference to the reference."""
    training, attention = variant.training, variant.attention
    trained = {metric.name: variant.pretrain.metrics.get(metric.name) for metric in PRETRAIN}
    trained["training_loss"] = trained.pop(TRAINING_LOSS.name)  # beside the validation loss
    of_attention = {name: value for name, value in variant.sparsity.metrics.items() if "/" not in name}
    metrics = {**trained, **variant.evaluate.metrics, **of_attention}
    return VariantRow(
        variant=variant.name,
        mixer=mixer_and_pattern(attention),
        mixer_name=attention.mixer,
        pattern=attention.pattern,
        parameters=training.parameters,
        non_embedding_parameters=training.non_embedding_parameters,
        steps=training.steps,
        tokens=training.tokens,
        seed=variant.pretrain.manifest.get("config", {}).get("seed"),
        metrics={name: None if value is None or not math.isfinite(value) else value for name, value in metrics.items()},
    )


def mixer_and_pattern(facts: SparsityFacts) -> str:
    """'lazy', or for a hybrid 'lazy, standard in even' and 'lazy, standard in 1 4'; of a standard model 'standard'."""
    if facts.mixer == STANDARD or facts.pattern == "uniform":
        return facts.mixer
    return f"{facts.mixer}, standard in {pattern_name(facts.pattern)}"


def pattern_name(pattern: Pattern) -> str:
    return pattern if isinstance(pattern, str) else " ".join(map(str, pattern))


def ranked(rows: Sequence[VariantRow], metric: str) -> list[tuple[VariantRow, float]]:
    """The rows that have a value of the metric of this name, with it, lowest first; ties keep their order."""
    pairs = [(row, float(value)) for row in rows if (value := row.metrics.get(metric)) is not None]
    return sorted(pairs, key=lambda pair: pair[1])
