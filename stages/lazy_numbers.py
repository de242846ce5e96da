"""What training logs of Lazy Attention: its thresholds, and how sparse they leave the weights."""

import numpy as np
import numpy.typing as npt
import torch

from model.mixers.lazy import LazyAttention
from model.transformer import Transformer
from stages.batches import document_borders, read_window
from stages.pretrain_config import PretrainConfig
from stages.shards import TokenShards

# Sparsity is measured on this many validation windows at validations and at every tenth logged step: 55 ms, 0.7 % of
# the quickstart's training time. Fixed windows make the curve smooth.
SPARSITY_WINDOWS = 2
SPARSITY_EVERY = 10


def lazy_numbers(
    model: Transformer,
    config: PretrainConfig,
    shards: TokenShards,
    windows: npt.NDArray[np.int64],
    validate: bool,
    step: int,
    eos_id: int | None,
) -> dict[str, float]:
    """tau by layer (mean over heads) and, now and then, the share of exactly-zero weights by layer.

    {} without Elastic-Softmax.
    """
    numbers = {}
    for index, layer in enumerate(model.layers):
        if isinstance(layer.mixer, LazyAttention) and layer.mixer.tau is not None:
            numbers[f"tau/layer_{index}"] = layer.mixer.tau.mean().item()
    if numbers and (validate or step % (SPARSITY_EVERY * config.log_every) == 0):
        sample = np.stack([read_window(shards, config.seq_len, w) for w in windows[:SPARSITY_WINDOWS]])
        tokens = torch.from_numpy(sample[:, :-1]).to(model.embedding.weight.device)
        if eos_id is None:
            shares = model.sparsity_by_layer(tokens)
        else:
            borders = torch.from_numpy(document_borders(sample, eos_id))
            shares = model.sparsity_by_layer(tokens.reshape(1, -1), borders)
        numbers |= {f"sparsity/layer_{index}": share for index, share in enumerate(shares or []) if share is not None}
    return numbers


def summary(by_layer: dict[str, float], config: PretrainConfig) -> dict[str, float | None]:
    """Means over layers for the history table: tau_mean and sparsity of a lazy model, null where not measured."""
    if config.model.mixer != "lazy" or not config.model.lazy_elastic:
        return {}
    means: dict[str, float | None] = {}
    for column, prefix in (("tau_mean", "tau/"), ("sparsity", "sparsity/")):
        values = [value for name, value in by_layer.items() if name.startswith(prefix)]
        means[column] = sum(values) / len(values) if values else None
    return means
