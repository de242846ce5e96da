"""What the variants of an experiment cost, as `lazypipe plan` prints it: parameters, operations per token, memory.

A trained tokenizer has the vocabulary that was asked for. That of a loaded one is known once the corpus is stored;
until then the largest that the storage type of a token id allows stands for it, which makes every number that depends
on it an upper bound, marked by <=.
"""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from lazypipe.model.mixers.registry import STANDARD, mechanism
from lazypipe.model.sizes import SIZES, size_row
from lazypipe.pipeline.experiment.resources import WorkerResources
from lazypipe.pipeline.experiment.schema import Experiment, id_of_node, models
from lazypipe.pipeline.store.store import Generation
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.stage_row import Vocabulary


def vocabulary(experiment: Experiment, corpus: Generation | None) -> Vocabulary | None:
    """The vocabulary an experiment's models will have; None when nothing bounds it yet."""
    if corpus is not None:
        return Vocabulary(TokenizeFacts.read(corpus.manifest).vocab_size, exact=True)
    for row in experiment.rows:
        if row.corpus is not None:
            return row.corpus.vocabulary(experiment.configs[row.name])
    return None


def cost_rows(experiment: Experiment, vocab: Vocabulary | None) -> list[dict[str, Any]]:
    """A row of plain numbers per variant; None for what depends on a vocabulary that nothing bounds.

    difference: parameters against the first standard variant, or the first. memory: bytes of one training worker.
    """
    rows = []
    for row in experiment.rows:
        if row.models is None:
            continue
        held = experiment.resources[row.name]
        workers = held.worker_range[0] if isinstance(held, WorkerResources) else 1
        for name in experiment.variants:
            rows.append(
                {"variant": name, **row.models.costs(experiment.configs[id_of_node(row, name)], vocab, workers)}
            )
    trained = list(models(experiment).values())
    reference = next((number for number, model in enumerate(trained) if set(model.layer_mixers) == {STANDARD}), 0)
    for costs, model in zip(rows, trained, strict=True):
        if model.tie_embeddings == trained[reference].tie_embeddings:  # then the vocabulary cancels
            costs["difference"] = costs["non_embedding_parameters"] - rows[reference]["non_embedding_parameters"]
        elif vocab is not None and vocab.exact:
            costs["difference"] = costs["parameters"] - rows[reference]["parameters"]
    return rows


def show_costs(rows: list[dict[str, Any]], console: Console) -> None:
    """Print `cost_rows` as a table, with a line on what its numbers mean."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("variant", overflow="fold")
    for heading in ("parameters", "non-embedding", "difference", "FLOPs/token", "memory", "weights", "gradients",
                    "optimizer", "activations", "logits"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    largest = max((row["memory"]["total"] for row in rows if row["memory"] is not None), default=0)
    unit, size_of_unit = ("GiB", 2**30) if largest > 2**30 else ("MiB", 2**20)
    for row in rows:
        vocab = row["vocabulary"]
        sign = "" if vocab is None or vocab["exact"] else "<="
        flops, memory = row["training_flops_per_token"], row["memory"]
        parts = ("total", "weights", "gradients", "optimizer", "activations", "logits")
        table.add_row(
            row["variant"],
            "unknown" if row["parameters"] is None else f"{sign}{row['parameters']:,}",
            f"{row['non_embedding_parameters']:,}",
            "unknown" if row["difference"] is None else f"{row['difference']:+,}" if row["difference"] else "0",
            "unknown" if flops is None else f"{sign}{flops:.3g}",
            *("unknown" if memory is None else _written(memory[part] / size_of_unit) for part in parts),
        )
    console.print(table)
    vocab = rows[0]["vocabulary"]
    if vocab is None:
        text = "vocabulary: unknown until tokenized, and with it what is"
    elif vocab["exact"]:
        text = f"vocabulary: {vocab['size']:,} tokens"
    else:
        text = f"vocabulary: unknown until tokenized; <= counts {vocab['size']:,} tokens, the most that uint16 holds"
    lines = [
        text,
        "difference: in parameters, to the first standard variant",
        "FLOPs: forward and backward, matrix products, attention over all pairs of a window",
        f"memory: of one training worker, an upper estimate, in {unit}",
    ]
    baselines = [row["variant"] for row in rows if mechanism(row["mixer"]).whole_model]
    if baselines:
        lines.append(
            f"{', '.join(baselines)}: the numbers of the standard model that a baseline is matched to, not its own"
        )
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _written(size: float) -> str:
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


def show_sizes(as_json: bool, console: Console) -> None:
    """`lazypipe variants --sizes`: the papers' model sizes with their parameter counts."""
    rows = [size_row(name) for name in SIZES]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("size")
    for heading in ("hidden", "MLP", "layers", "heads (width)", "vocabulary", "non-embedding", "tied", "untied",
                    "lazy adds"):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        counts = (f"{row[key]:,}" for key in ("vocab_size", "non_embedding", "tied", "untied", "lazy_adds"))
        shape = (str(row[key]) for key in ("hidden_size", "intermediate_size", "num_layers"))
        name = f"{row['size']}{' (q/k norm)' if row['qk_norm'] else ''}"
        table.add_row(name, *shape, f"{row['num_heads']} ({row['head_dim']})", *counts)
    console.print(table)
