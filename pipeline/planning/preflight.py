"""Everything that can be refused before any compute: sources, tracking, disk space, GPUs that are not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazypipe.model.config import parameter_count
from lazypipe.pipeline.experiment.schema import Experiment
from lazypipe.pipeline.planning.plan import Plan
from lazypipe.pipeline.store.store import Generation
from lazypipe.stages.contract import UserError
from lazypipe.stages.evaluate.benchmarks.tasks import pin_tasks, tasks_identity
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.sparsity.config import SparsityConfig
from lazypipe.stages.tokenization.config import TokenizeConfig
from lazypipe.stages.tokenization.identity import SourceSummary, check_source, pin, source_identity

RESERVE_BYTES = 32 * 2**20  # MLflow's database, tables, figures
BYTES_PER_TOKEN_GUESS = 2  # of text; a byte-level BPE gives 3-4, so this is on the safe side
VOCABULARY_GUESS = 65_536  # for a tokenizer that is not trained here


@dataclass(frozen=True)
class Sources:
    """An experiment whose hub revisions are pinned, what is known of its corpus, and what of that enters the recipe.

    tasks: by variant, what of its benchmarks' data enters the recipe of its evaluation.
    """

    experiment: Experiment
    summary: SourceSummary
    identity: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]


def inspect_sources(experiment: Experiment, root: Path, write_cache: bool = True) -> Sources:
    """Check that the corpus, the tokenizer and the benchmarks can be used, and pin what they are.

    File hashes are cached below the root, unless `write_cache` is false and nothing was written there yet.
    """
    cache = root / "cache" if write_cache or root.exists() else None
    min_tokens = 1 + max(
        length
        for variant in experiment.variants.values()
        for length in (
            variant.pretrain.seq_len,
            variant.sparsity.seq_len,
            *(length for _, length in variant.evaluate.window_lengths()),
        )
    )
    config = pin(experiment.tokenize)
    summary = check_source(config, cache, min_tokens=min_tokens)
    variants, tasks = {}, {}
    for name, variant in experiment.variants.items():
        evaluate = pin_tasks(variant.evaluate)
        variants[name] = variant.model_copy(update={"evaluate": evaluate})
        tasks[name] = tasks_identity(evaluate, cache)
    pinned = experiment.model_copy(update={"tokenize": config, "variants": variants})
    return Sources(pinned, summary, source_identity(config, cache), tasks)


def check_root(root: Path) -> None:
    """Refuse a root that cannot be written: below a file, on a read-only file system, with an impossible name."""
    try:
        existing = next(p for p in (root, *root.parents) if p.exists())
    except OSError as error:
        raise UserError(f"the root {root} is not usable: {error.strerror}; choose another with --root") from error
    if not existing.is_dir():
        raise UserError(f"the root {root} is not usable: {existing} is a file; choose another with --root")
    if not os.access(existing, os.W_OK):
        raise UserError(f"the root {root} is not usable: {existing} is not writable; choose another with --root")


def check_lengths(plan: Plan, corpus: Generation) -> None:
    """Refuse windows that the tokenized corpus cannot fill, before anything trains on it."""
    splits = TokenizeFacts.read(corpus.manifest).splits
    for decision in plan.values():
        config = decision.node.config
        if decision.action != "run":
            continue
        needs: list[tuple[str, str, int]] = []
        if isinstance(config, PretrainConfig):
            needs = [("pretrain.seq_len", split, config.seq_len) for split in ("train", "validation")]
        elif isinstance(config, EvaluateConfig):
            longest = max(config.window_lengths(), key=lambda window: window[1])
            needs = [(longest[0], "validation", longest[1])]
        elif isinstance(config, SparsityConfig):
            needs = [("sparsity.seq_len", "validation", config.seq_len)]
        for key, split, length in needs:
            tokens = splits[split].tokens
            if tokens < length + 1:
                raise UserError(
                    f"{decision.node.id}: {key}={length} needs {length + 1} tokens, but the {split} split has "
                    f"{tokens:,}; lower it, give more text, or change tokenize.validation_fraction"
                )


def check_baselines(plan: Plan) -> None:
    """Refuse baselines whose package this machine lacks. Where stages run elsewhere, the stage itself refuses."""
    for decision in plan.values():
        config = decision.node.config
        missing = config.model.missing_package if isinstance(config, PretrainConfig) else None
        if decision.action == "run" and missing is not None:
            raise UserError(f"{decision.node.id}: {missing}")


def check_disk(plan: Plan, root: Path, corpus_bytes: int) -> None:
    """Refuse when what will run cannot fit below the root: token shards, resume checkpoints, final weights."""
    needed = RESERVE_BYTES
    parts = []
    for decision in plan.values():
        if decision.action != "run":
            continue
        config = decision.node.config
        size = 0
        if isinstance(config, TokenizeConfig):
            size = corpus_bytes // BYTES_PER_TOKEN_GUESS * (2 if config.token_dtype == "uint16" else 4)
        elif isinstance(config, PretrainConfig):
            size = checkpoint_bytes(config, _vocab_size(plan))
        if size:
            needed += size
            parts.append(f"{decision.node.id} {_mib(size)}")
    existing = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"not enough disk space below {root}: about {_mib(needed)} needed ({', '.join(parts)}, "
            f"reserve {_mib(RESERVE_BYTES)}), {_mib(free)} free; free some, or choose another root with --root"
        )


def checkpoint_bytes(config: PretrainConfig, vocab_size: int) -> int:
    """float32 weights, plus weights and two moments for every kept resume checkpoint and the one being written."""
    return parameter_count(config.model, vocab_size) * 4 * (1 + 3 * (config.keep_checkpoints + 1))


def _vocab_size(plan: Plan) -> int:
    config = plan["tokenize"].node.config
    assert isinstance(config, TokenizeConfig)
    return int(getattr(config.tokenizer, "vocab_size", VOCABULARY_GUESS))


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
