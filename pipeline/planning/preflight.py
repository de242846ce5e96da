"""Everything that can be refused before any compute: sources, tracking, disk space, GPUs that are not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lazypipe.pipeline.experiment.schema import Experiment
from lazypipe.pipeline.planning.plan import Plan, corpus_of
from lazypipe.pipeline.store.store import Generation
from lazypipe.stages.contract import UserError
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.stage_row import CorpusSize

RESERVE_BYTES = 32 * 2**20  # MLflow's database, tables, figures
VOCABULARY_GUESS = 65_536  # for a tokenizer that is not trained here


@dataclass(frozen=True)
class Sources:
    """An experiment whose hub revisions are pinned, the size of its text, and what of its data enters the recipes.

    text_bytes: of the corpus, 0 when unknown. identity: by node id, what its data adds to the fingerprint.
    """

    experiment: Experiment
    text_bytes: int
    identity: Mapping[str, Mapping[str, Any]]


def inspect_sources(experiment: Experiment, root: Path, write_cache: bool = True) -> Sources:
    """Check that the data stages read (corpus, tokenizer, benchmarks) can be used, and pin what they are.

    File hashes are cached below the root, unless `write_cache` is false and nothing was written there yet.
    """
    cache = root / "cache" if write_cache or root.exists() else None
    nodes = [(node, *experiment.row_and_config(node)) for node in experiment.configs]
    longest = max((window.length for _, row, config in nodes for window in row.windows(config)), default=0)
    text_bytes = 0
    pinned, identity = {}, {}
    for node, row, config in nodes:
        pinned[node] = row.pin(config)
        if row.corpus is not None:
            text_bytes = row.corpus.check(pinned[node], cache, min_tokens=1 + longest)
        identity[node] = row.source_identity(pinned[node], cache)
    return Sources(replace(experiment, configs=pinned), text_bytes, identity)


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
        if decision.action != "run":
            continue
        windows = decision.node.row.windows(decision.node.config)
        for key, split, length in sorted(windows, key=lambda window: -window.length):
            tokens = splits[split].tokens
            if tokens < length + 1:
                raise UserError(
                    f"{decision.node.id}: {key}={length} needs {length + 1} tokens, but the {split} split has "
                    f"{tokens:,}; lower it, give more text, or change tokenize.validation_fraction"
                )


def check_baselines(plan: Plan) -> None:
    """Refuse baselines whose package this machine lacks. Where stages run elsewhere, the stage itself refuses."""
    for decision in plan.values():
        making = decision.node.row.models
        missing = making.model(decision.node.config).missing_package if making is not None else None
        if decision.action == "run" and missing is not None:
            raise UserError(f"{decision.node.id}: {missing}")


def check_disk(plan: Plan, root: Path, text_bytes: int) -> None:
    """Refuse when what will run cannot fit below the root: token shards, resume checkpoints, final weights."""
    needed = RESERVE_BYTES
    parts = []
    corpus = CorpusSize(text_bytes, _vocab_size(plan))
    for decision in plan.values():
        if decision.action != "run":
            continue
        size = decision.node.row.disk_bytes(decision.node.config, corpus)
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


def _vocab_size(plan: Plan) -> int:
    """The vocabulary that models are planned for, where no corpus is stored yet: that of a tokenizer trained here."""
    decision = corpus_of(plan)
    making = None if decision is None else decision.node.row.corpus
    known = None if decision is None or making is None else making.vocabulary(decision.node.config)
    return known.size if known is not None and known.exact else VOCABULARY_GUESS


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
