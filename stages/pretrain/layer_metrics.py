"""What training logs of attention, layer by layer: Lazy Attention's thresholds, exact zeros, and the sink."""

import numpy as np
import numpy.typing as npt
import torch

from lazypipe.model.config import BASELINES
from lazypipe.model.mixers.lazy import LazyAttention
from lazypipe.model.transformer import Transformer
from lazypipe.stages.data.batches import document_borders, read_window
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.pretrain.config import PretrainConfig

# Sparsity and sink are measured on this many validation windows at validations and at every tenth logged step.
# Fixed windows make the curve smooth.
SAMPLE_WINDOWS = 2
SAMPLE_EVERY = 10


def attention_numbers(
    model: Transformer,
    config: PretrainConfig,
    shards: TokenShards,
    windows: npt.NDArray[np.int64],
    validate: bool,
    step: int,
    eos_id: int | None,
) -> dict[str, float]:
    """By layer: tau (mean over heads) where there is one and, now and then, the share of exactly-zero weights
    (`sparsity`, of mechanisms that can have zeros) and the mean weight on the first key a query sees (`sink`).
    """
    numbers = {}
    for index, layer in enumerate(model.layers):
        if isinstance(layer.mixer, LazyAttention) and layer.mixer.tau is not None:
            numbers[f"tau/layer_{index}"] = layer.mixer.tau.mean().item()
    if config.model.mixer in BASELINES or not (validate or step % (SAMPLE_EVERY * config.log_every) == 0):
        return numbers
    sample = np.stack([read_window(shards, config.seq_len, w) for w in windows[:SAMPLE_WINDOWS]])
    tokens = torch.from_numpy(sample[:, :-1]).to(model.embedding.weight.device)
    if eos_id is None:
        found = model.statistics_by_layer(tokens)
    else:
        borders = torch.from_numpy(document_borders(sample, eos_id))
        found = model.statistics_by_layer(tokens.reshape(1, -1), borders)
    for name, values in zip(("sparsity", "sink"), zip(*found, strict=True), strict=True):
        numbers |= {f"{name}/layer_{index}": value for index, value in enumerate(values) if value is not None}
    return numbers


def summary(by_layer: dict[str, float], config: PretrainConfig) -> dict[str, float | None]:
    """Means over layers for the history table, null where not measured: sink, and of a lazy model tau_mean and
    sparsity.
    """
    columns = [] if config.model.mixer in BASELINES else [("sink", "sink/")]
    if config.model.mixer == "lazy" and config.model.lazy_elastic:
        columns += [("tau_mean", "tau/"), ("sparsity", "sparsity/")]
    means: dict[str, float | None] = {}
    for column, prefix in columns:
        values = [value for name, value in by_layer.items() if name.startswith(prefix)]
        means[column] = sum(values) / len(values) if values else None
    return means
