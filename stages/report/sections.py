"""The parts of a report that only its page shows: settings, context lengths, continuations, figures, provenance."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazypipe.stages.config import flatten
from lazypipe.stages.contract import Artifact
from lazypipe.stages.facts import ComputeFacts, TokenizeFacts
from lazypipe.stages.figures import listed
from lazypipe.stages.formats import loss, perplexity
from lazypipe.stages.report.rows import Variant, VariantRow, read_table
from lazypipe.stages.report.table import MISSING
from lazypipe.stages.warning_lines import warning_text

MAX_LAYERS = 3  # first, middle and last; the rest is among the stage's own figures


@dataclass(frozen=True)
class Origin:
    """Where a result is from: what exactly it is and where it was made; what a manifest does not say is a dash."""

    node: str
    fingerprint: str
    generation: str
    created: str
    seconds: str
    device: str
    threads: str
    commit: str


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


def ablations(rows: Sequence[VariantRow]) -> list[dict[str, Any]]:
    """A line per variant that was scored without its mixers: losses as they are, without blocks, without mixers."""
    keys = ("validation_loss", "validation_loss/skip", "validation_loss/skip_mixer")
    lines = []
    for row in rows:
        losses = [row.metrics.get(key) for key in keys]
        if any(value is not None for value in losses[1:]):
            lines.append({"variant": row.variant, "cells": [MISSING if one is None else loss(one) for one in losses]})
    return lines


def context_lengths(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """A line per context length any variant was evaluated at, a perplexity per variant; † marks extrapolation."""
    tables = [{row["context_length"]: row for row in read_table(v.evaluate, "context_lengths")} for v in variants]
    lengths = sorted({length for table in tables for length in table})
    lines = []
    for length in lengths:
        cells = [
            MISSING if row is None else perplexity(row["perplexity"]) + (" †" if row["extrapolation"] else "")
            for row in (table.get(length) for table in tables)
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
    """Copy what each variant's stages have drawn to output_dir/figures/<variant>_<name>.png; groups for the page.

    Of a figure per layer, those of the first, the middle and the last: all of them, for 24 layers and 20 variants,
    would make a page of some 100 MB.
    """
    groups = []
    for variant in variants:
        files = []
        for artifact, figures in ((variant.evaluate, listed.EVALUATE), (variant.sparsity, listed.SPARSITY)):
            for figure in figures:
                drawn = [] if figure.together else list(figure.files(artifact.path / "figures"))
                chosen = sorted({0, len(drawn) // 2, len(drawn) - 1}) if len(drawn) > MAX_LAYERS else range(len(drawn))
                for source, caption in (drawn[index] for index in chosen):
                    target = output_dir / "figures" / f"{variant.name}_{source.name}"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
                    files.append({"path": f"figures/{target.name}", "caption": f"{variant.name}: {caption}"})
        groups.append({"variant": variant.name, "files": files})
    return groups


def warnings_of(inputs: Mapping[str, Artifact]) -> list[dict[str, str]]:
    """Every warning an upstream stage left in its manifest, with the stage's name."""
    return [
        {"node": node, "message": warning_text(entry)}
        for node, artifact in inputs.items()
        for entry in artifact.manifest.get("warnings", [])
    ]


def provenance(inputs: Mapping[str, Artifact]) -> tuple[Origin, ...]:
    """The origin of every input, in their order."""
    return tuple(origin(node, artifact.manifest) for node, artifact in inputs.items())


def origin(node: str, manifest: Mapping[str, Any]) -> Origin:
    machine = ComputeFacts.read(manifest)
    code = manifest.get("code") or {}
    commit = str(code.get("commit") or "")[:12]
    return Origin(
        node=node,
        fingerprint=str(manifest.get("fingerprint") or MISSING)[:12],
        generation=str(manifest.get("generation") or MISSING),
        created=str(manifest.get("created") or MISSING),
        seconds=f"{manifest['seconds']:.1f}" if "seconds" in manifest else MISSING,
        device=machine.device or MISSING,
        threads=str(machine.threads or manifest.get("threads") or MISSING),
        commit=(commit + (" with changes" if code.get("dirty") else "")) if commit else MISSING,
    )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in values.items() if value not in (None, {}))


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return MISSING if value is None else f"{value:g}" if isinstance(value, float) else str(value)
