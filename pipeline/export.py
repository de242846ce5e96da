"""`lazypipe export`: a stored model, or any checkpoint folder, as a Hugging Face folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from pipeline.document import nearest
from pipeline.experiment import load_experiment, resolve_root
from pipeline.plan import Selection, build_nodes, decide
from pipeline.preflight import inspect_sources
from pipeline.store import Generation, Store, read_generation
from stages.contract import Refusal

CHECKPOINT = "checkpoint"  # where the pretrain stage writes its model, below its generation


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
    if source.is_dir():
        if variant is not None or overrides:
            raise Refusal(f"{source} is a checkpoint folder; --variant and key=value belong to an experiment file")
        directory = source / CHECKPOINT if (source / CHECKPOINT).is_dir() else source
        generation = _generation_of(directory)
    else:
        generation = _stored(source, variant, overrides, root_option)
        directory = generation.path / CHECKPOINT
    from model.checkpoint import CheckpointError
    from model.export import ExportError, export_huggingface

    try:
        written = export_huggingface(directory, target, force, _origin(generation))
    except (CheckpointError, ExportError) as error:
        raise Refusal(str(error)) from error
    console.print(f"exported {directory} to {written}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"load it with AutoModelForCausalLM.from_pretrained({str(written)!r}, trust_remote_code=True)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _stored(config: Path, variant: str | None, overrides: Sequence[str], root_option: str | None) -> Generation:
    """The current pretrain generation of a variant; a Refusal that says how to make it where there is none."""
    experiment = load_experiment(config, overrides)
    names = list(experiment.variants)
    if variant is None and len(names) > 1:
        raise Refusal(f"{config} has the variants {', '.join(names)}; choose one with --variant")
    chosen = names[0] if variant is None else variant
    if chosen not in experiment.variants:
        raise Refusal(f"--variant {chosen}: {config} has no such variant{nearest(chosen, names)}")
    root = resolve_root(experiment, root_option)
    sources = inspect_sources(experiment, root, write_cache=False)
    decision = decide(build_nodes(sources.experiment, sources.identity), Store(root), Selection())[f"pretrain/{chosen}"]
    if decision.generation is None:
        again = ["lazypipe", "run", str(config), *overrides, "--only", f"pretrain/{chosen}"]
        again += [] if root_option is None else ["--root", root_option]
        raise Refusal(
            f"pretrain/{chosen} of {config} has no valid result below {root} ({'; '.join(decision.reasons)}); "
            f"make it with: {shlex.join(again)}"
        )
    return decision.generation


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
    facts, metrics = manifest["facts"], manifest["metrics"]
    found = {
        "experiment": manifest.get("experiment"),
        "variant": manifest.get("variant"),
        "training": f"{facts['tokens']:,} tokens in {facts['steps']:,} steps" if "tokens" in facts else None,
        "validation loss": f"{metrics['validation_loss']:.4f} nats per token" if "validation_loss" in metrics else None,
        "result": generation.id,
        "commit": manifest.get("code", {}).get("commit"),
    }
    return {name: str(value) for name, value in found.items() if value}
