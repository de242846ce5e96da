"""Which trained model a command line means: a checkpoint folder, or a variant of an experiment in its store."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lazypipe.model.baselines import BaselineError, check_baseline
from lazypipe.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE, Checkpoint, CheckpointError, load_checkpoint
from lazypipe.pipeline.experiment.schema import load_experiment, resolve_root
from lazypipe.pipeline.planning.plan import build_nodes
from lazypipe.pipeline.planning.preflight import inspect_sources
from lazypipe.pipeline.store.store import Store
from lazypipe.stages.contract import UserError, first_line, nearest


@dataclass(frozen=True)
class Trained:
    """A loaded checkpoint with its tokenizer (tokenizers.Tokenizer)."""

    checkpoint: Checkpoint
    tokenizer: object


def checkpoint_folder(target: Path, variant: str | None, overrides: Sequence[str], root: str | None) -> Path:
    """The folder of the checkpoint that `target` means; UserError when there is none.

    A folder is a checkpoint, or holds one as `checkpoint/`, as the result of the stage that makes models does. A file
    is an experiment, whose `variant` (needed when there are several) is looked up in the store below `root`.
    """
    if target.is_dir():
        if variant is not None or overrides:
            raise UserError(f"{target} is a checkpoint folder: --variant and overrides belong to an experiment file")
        inside = target / "checkpoint"
        return inside if not (target / CONFIG_FILE).is_file() and inside.is_dir() else target
    if not target.exists():
        raise UserError(f"{target} does not exist; give a checkpoint folder, or an experiment file and --variant")
    experiment = load_experiment(target, overrides)
    names = list(experiment.variants)
    if variant is None and len(names) > 1:
        raise UserError(f"{target} has several variants; choose one with --variant: {', '.join(names)}")
    variant = variant or names[0]
    if variant not in experiment.variants:
        raise UserError(f"--variant {variant}: {target} has no such variant{nearest(variant, names)}")
    place = resolve_root(experiment, root)
    sources = inspect_sources(experiment, place, write_cache=False)
    nodes = build_nodes(sources.experiment, sources.identity).values()
    node = next(node for node in nodes if node.row.models is not None and node.variant == variant)
    entry = Store(place).entry(node.stage, node.fingerprint)
    again = shlex.join(
        ["lazypipe", "run", str(target), *overrides, "--only", node.id, *(["--root", root] if root else [])]
    )
    damage = entry.damage()
    generation = entry.current() if damage is None else None
    if damage is None and generation is not None:
        damage = generation.problem()
    if damage is not None:
        raise UserError(f"{node.id} is damaged: {damage}; make it again: {again}")
    if generation is None:
        raise UserError(f"{node.id} is not stored below {place}; train it first: {again}")
    return generation.path / "checkpoint"


def load_trained(folder: Path) -> Trained:
    """The model in a checkpoint folder, on the GPU if there is one, and its tokenizer; UserError naming what is wrong.

    The kernels that continue a text (float32) are compared with the reference first, where they are Triton's.
    """
    import torch
    from tokenizers import Tokenizer

    from lazypipe.stages.model_checks import check_inference_kernels

    if not (folder / TOKENIZER_FILE).is_file() and (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} has no {TOKENIZER_FILE}, so text cannot be turned into its tokens; copy the one of the corpus "
            "it was trained on there"
        )
    try:
        checkpoint = load_checkpoint(folder, "cuda" if torch.cuda.is_available() else "cpu")
        check_baseline(checkpoint.model.config, checkpoint.model.embedding.weight.device)
    except (CheckpointError, BaselineError) as error:
        raise UserError(str(error)) from error
    try:
        tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{checkpoint.tokenizer_path} is not a tokenizer.json of the tokenizers library: {first_line(error)}"
        ) from None
    check_inference_kernels(checkpoint.model, torch.float32)
    return Trained(checkpoint, tokenizer)
