"""What a stage promises the stages and commands after it, beside its files and metrics: a frozen dataclass per stage.

A manifest holds them as JSON under "facts". `read` makes them of a manifest again. Every field is required of the stage
that writes it, so that none is forgotten; of a manifest written before a field existed, the field has the value in
`absent(value)`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from lazypipe.stages.contract import UserError

Pattern = str | list[int]  # which layers of a hybrid are standard: model/pattern.py


def absent(value: Any) -> dict[str, Any]:
    """Metadata of a field that older manifests do not have: what it is there."""
    return {"absent": value}


class _Json:
    """Reading and writing of a dataclass as a JSON object; None is a key that is not there."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any], place: str = "facts") -> Self:
        """Keys of other versions are passed over. UserError names what is missing, and `place`, where it is."""
        known: dict[str, Any] = {}
        missing = []
        for one in fields(cls):  # type: ignore[arg-type]  # every subclass is a dataclass
            if one.name in values:
                known[one.name] = values[one.name]
            elif "absent" in one.metadata:
                known[one.name] = one.metadata["absent"]
            else:
                missing.append(one.name)
        if missing:
            raise UserError(
                f"{place} lack {', '.join(missing)}, which {cls.__name__} needs: this result is of another version; "
                "compute it again with  lazypipe run CONFIG --force STAGE"
            )
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}  # type: ignore[call-overload]


class Facts(_Json):
    """Base of the facts of all stages."""

    @classmethod
    def read(cls, manifest: Mapping[str, Any]) -> Self:
        """The facts in the manifest of a result; UserError when it lacks some."""
        where = "/".join(str(manifest[key]) for key in ("stage", "variant") if manifest.get(key))
        generation = f", generation {manifest['generation']}," if "generation" in manifest else ""
        return cls.from_json(manifest["facts"], f"the facts of {where or 'a result'}{generation}")


@dataclass(frozen=True, kw_only=True)
class ComputeFacts(Facts):
    """What a stage that computes ran on. device: cpu or cuda.

    preflight, preflight_errors, preflight_bound: the kernel checked before it computed, its largest errors against the
    float64 reference by tensor, and what they may not exceed; None where no Triton kernel runs.
    """

    threads: int | None = field(metadata=absent(None))
    device: str | None = field(metadata=absent(None))
    preflight: str | None = field(default=None, metadata=absent(None))
    preflight_errors: dict[str, float] | None = field(default=None, metadata=absent(None))
    preflight_bound: float | None = field(default=None, metadata=absent(None))


# ---- tokenize


@dataclass(frozen=True)
class SplitFacts(_Json):
    """One side of the split. bytes: of text. shards: file names, in order."""

    documents: int
    tokens: int
    bytes: int
    shards: list[str]


@dataclass(frozen=True)
class SourceFacts(_Json):
    """The text read. fingerprint: sha256 of all that decides the tokens. commit: of a hub dataset."""

    kind: str
    fingerprint: str
    files: int
    documents: int
    skipped_rows: int
    bytes: int
    commit: str | None = field(metadata=absent(None))


@dataclass(frozen=True)
class DroppedFacts(_Json):
    """What a document filter left out."""

    documents: int
    bytes: int


@dataclass(frozen=True)
class UnitFacts(_Json):
    """Units of work, and how much of it an interrupted execution had done before."""

    total: int
    read_before: int
    encoded_before: int
    tokenizer_before: bool


@dataclass(frozen=True)
class TokenizeFacts(Facts):
    """The corpus. invalid_utf8_bytes: replaced. document_length_histogram: rows of tables/document_lengths."""

    vocab_size: int
    eos_id: int
    eos_token: str
    token_dtype: str
    splits: dict[str, SplitFacts]
    source: SourceFacts
    filters: dict[str, DroppedFacts] = field(metadata=absent({}))
    units: UnitFacts | None = field(metadata=absent(None))
    invalid_utf8_bytes: int = field(metadata=absent(0))
    document_length_histogram: list[dict[str, int]] = field(metadata=absent([]))

    @classmethod
    def from_json(cls, values: Mapping[str, Any], place: str = "facts") -> Self:
        made: dict[str, Any] = {}
        if "splits" in values:
            made["splits"] = {
                name: SplitFacts.from_json(split, f"{place}, splits.{name},")
                for name, split in values["splits"].items()
            }
        if "source" in values:
            made["source"] = SourceFacts.from_json(values["source"], f"{place}, source,")
        if "filters" in values:
            made["filters"] = {
                name: DroppedFacts.from_json(dropped, f"{place}, filters.{name},")
                for name, dropped in values["filters"].items()
            }
        if values.get("units") is not None:
            made["units"] = UnitFacts.from_json(values["units"], f"{place}, units,")
        return super().from_json({**values, **made}, place)

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "source": self.source.to_json()}


# ---- pretrain


@dataclass(frozen=True)
class Attempt(_Json):
    """One attempt at a training run. attempt: from 1. started: ISO 8601, UTC. cause: what ended the one before."""

    attempt: int
    started: str
    from_step: int
    workers: int
    cause: str | None  # None of the first


@dataclass(frozen=True, kw_only=True)
class PretrainFacts(ComputeFacts):
    """A training run. parallel: replicate or fsdp. peak_flops: FLOP/s of a GPU, or "unknown". gpu: name, or "none"."""

    parameters: int
    non_embedding_parameters: int
    seq_len: int
    steps: int
    steps_executed: int
    resumed_from: int
    tokens: int
    attempts: list[Attempt] = field(metadata=absent([]))
    document_masking: bool = field(metadata=absent(False))
    nonfinite_steps: int = field(metadata=absent(0))
    spikes_skipped: int = field(metadata=absent(0))
    kernel: str | None = field(metadata=absent(None))
    world_size: int = field(metadata=absent(1))
    parallel: str = field(metadata=absent("replicate"))
    reduction: str | None = field(metadata=absent(None))
    gpu: str | None = field(metadata=absent(None))
    flops_per_token: float | None = field(metadata=absent(None))
    peak_flops: float | str = field(metadata=absent("unknown"))

    @classmethod
    def from_json(cls, values: Mapping[str, Any], place: str = "facts") -> Self:
        attempts = [Attempt.from_json(one, f"{place}, attempts,") for one in values.get("attempts", ())]
        return super().from_json({**values, "attempts": attempts}, place)


# ---- evaluate, sparsity, report


@dataclass(frozen=True, kw_only=True)
class EvaluateFacts(ComputeFacts):
    """A scored model. seq_len: what it was trained at. byte_scale: bytes of the split / bytes the token table counts.

    tasks: what each benchmark cost, by name (requests, documents, truncated, seconds, ...); lm_eval: the harness's
    version; None without benchmarks.
    """

    max_seq_len: int
    seq_len: int
    validation_tokens_scored: int
    byte_scale: float
    tasks: dict[str, dict[str, Any]] | None = field(default=None, metadata=absent(None))
    lm_eval: str | None = field(default=None, metadata=absent(None))


@dataclass(frozen=True, kw_only=True)
class SparsityFacts(ComputeFacts):
    """A measured attention. windows: measured, of windows_asked. heat_map_heads: the heads drawn, by number."""

    windows: int
    windows_asked: int
    seq_len: int
    beyond_max_seq_len: bool
    untrained_seed: int
    heat_map_heads: list[int]
    mixer: str
    pattern: Pattern = field(metadata=absent("uniform"))
    attention_layers: list[int] | None = field(metadata=absent(None))


@dataclass(frozen=True)
class ReportFacts(Facts):
    """reference: the variant that the others are compared with."""

    variants: list[str]
    reference: str
