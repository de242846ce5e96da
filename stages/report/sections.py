"""The parts of a report that only its page shows: settings, context lengths, continuations, figures, provenance."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lazypipe.stages.config import flatten
from lazypipe.stages.contract import Artifact
from lazypipe.stages.facts import ComputeFacts, EvaluateFacts, PretrainFacts, SparsityFacts, TokenizeFacts
from lazypipe.stages.report.table import MISSING, loss, perplexity
from lazypipe.stages.warning_lines import warning_text

MAX_ATTENTION_LAYERS = 3  # first, middle and last; the rest is among the sparsity stage's own figures


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


def read_table(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    """Rows of tables/<name>.parquet of a stage."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(artifact.path / "tables" / f"{name}.parquet").to_pylist()
    return rows


def settings(tokenize: Artifact, variants: Sequence[Variant]) -> dict[str, Any]:
    """{"setting": what all variants share, "differences": what they do not}, from the manifests' configs."""
    flat = [flatten(variant.pretrain.manifest.get("config", {})) for variant in variants]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    shared = [key for key in keys if all(config.get(key) == flat[0].get(key) for config in flat)]
    lines = [
        ("Corpus", corpus_description(tokenize)),
        ("Tokenizer", _listed(flatten(tokenize.manifest.get("config", {}).get("tokenizer", {})))),
        ("Model", _listed({key.removeprefix("model."): flat[0][key] for key in shared if key.startswith("model.")})),
        ("Training", _listed({key: flat[0][key] for key in shared if not key.startswith("model.")})),
    ]
    return {
        "setting": [{"name": name, "value": value} for name, value in lines if value],
        "differences": [
            {"name": key, "settings": [_value(config.get(key)) for config in flat]} for key in keys if key not in shared
        ],
    }


def corpus_description(tokenize: Artifact) -> str:
    """One line: where the text comes from, and how much of it there is on each side of the split."""
    facts = TokenizeFacts.read(tokenize.manifest)
    parts = [_listed(flatten(tokenize.manifest.get("config", {}).get("source", {})))]
    for split in ("train", "validation"):
        size = facts.splits[split]
        parts.append(f"{split} {size.documents:,} documents, {size.tokens:,} tokens, {size.bytes:,} bytes")
    parts.append(f"vocabulary {facts.vocab_size:,} tokens")
    if "bytes_per_token" in tokenize.metrics:
        parts.append(f"{tokenize.metrics['bytes_per_token']:.2f} bytes per token")
    return "; ".join(part for part in parts if part)


def ablations(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per variant that was scored without its mixers: losses as they are, without blocks, without mixers."""
    keys = ("validation_loss", "validation_loss/skip", "validation_loss/skip_mixer")
    return [
        {"variant": row["variant"], "cells": [MISSING if row.get(key) is None else loss(row[key]) for key in keys]}
        for row in rows
        if any(row.get(key) is not None for key in keys[1:])
    ]


def context_lengths(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """A line per context length any variant was evaluated at, a perplexity per variant; † marks extrapolation."""
    tables = [{row["context_length"]: row for row in read_table(v.evaluate, "context_lengths")} for v in variants]
    lengths = sorted({length for table in tables for length in table})
    lines = []
    for length in lengths:
        found = [table.get(length) for table in tables]
        cells = [
            MISSING if row is None else perplexity(row["perplexity"]) + (" †" if row["extrapolation"] else "")
            for row in found
        ]
        lines.append({"length": length, "cells": cells})
    return lines


def continuations(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Grouped by prompt, so that the variants' answers stand below each other."""
    groups: dict[str, list[dict[str, str]]] = {}
    for variant in variants:
        for row in read_table(variant.evaluate, "continuations"):
            text = {"variant": variant.name, "method": row["method"], "text": row["text"]}
            groups.setdefault(row["prompt"], []).append(text)
    return [{"prompt": prompt, "texts": texts} for prompt, texts in groups.items()]


def copy_figures(variants: Sequence[Variant], output_dir: Path) -> list[dict[str, Any]]:
    """Copy each variant's own figures to output_dir/figures/<variant>_<name>.png; groups for the page.

    Attention maps are taken of the first, the middle and the last layer: all of them, for 24 layers and 20 variants,
    would make a page of some 100 MB.
    """
    groups = []
    for variant in variants:
        folder = variant.sparsity.path / "figures"
        maps = sorted(folder.glob("attention_layer_*.png"), key=lambda path: int(path.stem.rpartition("_")[2]))
        chosen = sorted({0, len(maps) // 2, len(maps) - 1}) if len(maps) > MAX_ATTENTION_LAYERS else range(len(maps))
        wanted = [folder / "tau_heat_map.png", folder / "bias_curves.png", *(maps[index] for index in chosen)]
        files = []
        for source in wanted:
            if not source.is_file():
                continue  # only some mixers have thresholds and biases
            target = output_dir / "figures" / f"{variant.name}_{source.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            caption = f"{variant.name}: {source.stem.replace('_', ' ')}"
            files.append({"path": f"figures/{target.name}", "caption": caption})
        groups.append({"variant": variant.name, "files": files})
    return groups


def warnings_of(inputs: Mapping[str, Artifact]) -> list[dict[str, str]]:
    """Every warning an upstream stage left in its manifest, with the stage's name."""
    return [
        {"node": node, "message": warning_text(entry)}
        for node, artifact in inputs.items()
        for entry in artifact.manifest.get("warnings", [])
    ]


def provenance(inputs: Mapping[str, Artifact]) -> list[dict[str, str]]:
    """A line per input: what exactly it is and where it was made; what a manifest does not say is a dash."""
    lines = []
    for node, artifact in inputs.items():
        manifest = artifact.manifest
        machine = ComputeFacts.read(manifest)
        code = manifest.get("code") or {}
        commit = str(code.get("commit") or "")[:12]
        lines.append(
            {
                "node": node,
                "fingerprint": str(manifest.get("fingerprint") or MISSING)[:12],
                "generation": str(manifest.get("generation") or MISSING),
                "created": str(manifest.get("created") or MISSING),
                "seconds": f"{manifest['seconds']:.1f}" if "seconds" in manifest else MISSING,
                "device": machine.device or MISSING,
                "threads": str(machine.threads or manifest.get("threads") or MISSING),
                "commit": (commit + (" with changes" if code.get("dirty") else "")) if commit else MISSING,
            }
        )
    return lines


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in values.items() if value not in (None, {}))


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return MISSING if value is None else f"{value:g}" if isinstance(value, float) else str(value)
