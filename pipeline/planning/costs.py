"""What the variants of an experiment cost, as `lazypipe plan` prints it: parameters, operations per token, memory.

A trained tokenizer has the vocabulary that was asked for. That of a loaded one is known once the corpus is stored;
until then the largest that the storage type of a token id allows stands for it, which makes every number that depends
on it an upper bound, marked by <=.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lazypipe.model.config import BASELINES, parameter_count
from lazypipe.model.costs import non_embedding_parameters, training_flops_per_token, training_memory
from lazypipe.model.sizes import SIZES, size_row
from lazypipe.pipeline.experiment.schema import Experiment
from lazypipe.pipeline.store.store import Generation
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.tokenization.config import FileTokenizer, TokenizeConfig, TrainTokenizer


class Vocabulary(NamedTuple):
    """exact: whether `size` is the vocabulary, or only what it cannot exceed."""

    size: int
    exact: bool


def vocabulary(config: TokenizeConfig, corpus: Generation | None) -> Vocabulary | None:
    """The vocabulary an experiment's models will have; None when nothing bounds it yet."""
    if corpus is not None:
        return Vocabulary(TokenizeFacts.read(corpus.manifest).vocab_size, exact=True)
    if isinstance(config.tokenizer, TrainTokenizer):
        return Vocabulary(config.tokenizer.vocab_size, exact=True)
    if isinstance(config.tokenizer, FileTokenizer) and Path(config.tokenizer.path).suffix == ".json":
        size = _size_in_file(Path(config.tokenizer.path))
        if size is not None:
            return Vocabulary(size, exact=True)
    return Vocabulary(2**16, exact=False) if config.token_dtype == "uint16" else None


def _size_in_file(path: Path) -> int | None:
    """The number of tokens in a tokenizer.json; None when it is not one (planning says so in its own words)."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        model = stored["model"]["vocab"]
        ids = set(model.values()) if isinstance(model, dict) else set(range(len(model)))
        ids |= {token["id"] for token in stored.get("added_tokens", ())}
        return 1 + max(ids)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def cost_rows(experiment: Experiment, vocab: Vocabulary | None) -> list[dict[str, Any]]:
    """A row of plain numbers per variant; None for what depends on a vocabulary that nothing bounds.

    difference: parameters against the first standard variant, or the first. memory: bytes of one training worker.
    """
    rows = []
    for name, variant in experiment.variants.items():
        config, model = variant.pretrain, variant.pretrain.model
        row: dict[str, Any] = {
            "variant": name,
            "mixer": model.mixer,
            "vocabulary": None if vocab is None else vocab._asdict(),
            "non_embedding_parameters": non_embedding_parameters(model),
            "parameters": None,
            "difference": None,
            "training_flops_per_token": None,
            "training_tokens": config.steps * config.tokens_per_step,
            "memory": None,
        }
        if vocab is not None:
            shape = (model, vocab.size, config.seq_len, config.micro_batch_size)
            memory = training_memory(
                *shape,
                config.dtype,
                experiment.resources.pretrain.worker_range[0],
                config.loss_chunk_tokens,
                config.activation_checkpointing,
            )
            row |= {
                "parameters": parameter_count(model, vocab.size),
                "training_flops_per_token": training_flops_per_token(*shape),
                "memory": {**memory._asdict(), "total": memory.total},
            }
        rows.append(row)
    models = [variant.pretrain.model for variant in experiment.variants.values()]
    reference = next((number for number, model in enumerate(models) if set(model.layer_mixers) == {"standard"}), 0)
    for row, model in zip(rows, models, strict=True):
        if model.tie_embeddings == models[reference].tie_embeddings:  # then the vocabulary cancels
            row["difference"] = row["non_embedding_parameters"] - rows[reference]["non_embedding_parameters"]
        elif vocab is not None and vocab.exact:
            row["difference"] = row["parameters"] - rows[reference]["parameters"]
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
    baselines = [row["variant"] for row in rows if row["mixer"] in BASELINES]
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
