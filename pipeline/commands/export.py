"""`lazypipe export`: a stored model, or any checkpoint folder, as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from lazypipe.pipeline.commands.models import checkpoint_folder
from lazypipe.pipeline.store.store import Generation, read_generation
from lazypipe.stages.contract import UserError
from lazypipe.stages.facts import PretrainFacts


def run_export(
    source: Path,
    target: Path,
    variant: str | None,
    overrides: Sequence[str],
    root_option: str | None,
    force: bool,
    console: Console,
) -> None:
    """Export the checkpoint folder `source`, or the stored model of a variant of the experiment file `source`."""
    directory = checkpoint_folder(source, variant, overrides, root_option)
    from lazypipe.model.checkpoint import CheckpointError
    from lazypipe.model.export.export import ExportError, export_huggingface

    try:
        written = export_huggingface(directory, target, force, _origin(_generation_of(directory)))
    except (CheckpointError, ExportError) as error:
        raise UserError(str(error)) from error
    console.print(f"exported {directory} to {written}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"load it with AutoModelForCausalLM.from_pretrained({str(written)!r}, trust_remote_code=True)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _generation_of(directory: Path) -> Generation | None:
    """The generation that a checkpoint folder lies in, if it does."""
    try:
        return read_generation(directory.absolute().parent)
    except (OSError, ValueError):
        return None


def _origin(generation: Generation | None) -> Mapping[str, str]:
    """Rows of the model card: where the weights come from."""
    if generation is None:
        return {}
    manifest = generation.manifest
    facts, metrics = PretrainFacts.read(manifest), manifest["metrics"]
    found = {
        "experiment": manifest.get("experiment"),
        "variant": manifest.get("variant"),
        "training": f"{facts.tokens:,} tokens in {facts.steps:,} steps",
        "validation loss": f"{metrics['validation_loss']:.4f} nats per token" if "validation_loss" in metrics else None,
        "result": generation.id,
        "commit": manifest.get("code", {}).get("commit"),
    }
    return {name: str(value) for name, value in found.items() if value}
