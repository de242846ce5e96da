"""What the sparsity stage measures of a trained model, and of the same model with its initial weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lazypipe.model.baselines import build_model
from lazypipe.model.checkpoint import Checkpoint
from lazypipe.model.config import ModelConfig
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Context, Interrupted
from lazypipe.stages.data.batches import read_window
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.sparsity.config import SparsityConfig
from lazypipe.stages.sparsity.metrics import MEASURES, average_windows, measure_windows

HEAT_MAP_TOKENS = 256  # a figure of more tokens than pixels would have to merge weights, zeros among them

Array = NDArray[Any]
HeadMetrics = dict[str, NDArray[np.float64]]  # name -> [layers, H], NaN in layers without attention weights


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that tables, metrics and figures are made from.

    trained, untrained  metrics of the attention weights, by name [layers, H]
    attention_layers    numbers of the layers that have such weights
    taus                [layers, H], NaN in a hybrid's other layers; None when no layer has any
    biases, untrained_biases   the same of the distance bias, [layers, H, W]
    maps                attention weights of `heads` in the first window, [layers, len(heads), T, T]
    seq_len             tokens per window
    """

    model: ModelConfig
    trained: HeadMetrics
    untrained: HeadMetrics
    attention_layers: list[int]
    taus: Array | None
    biases: Array | None
    untrained_biases: Array | None
    maps: Array
    heads: list[int]
    seq_len: int


def measure(
    checkpoint: Checkpoint,
    seed: int,
    shards: TokenShards,
    windows: NDArray[np.int64],
    config: SparsityConfig,
    context: Context,
) -> Measured:
    """Measure the model of a checkpoint, and the one that its training began with, on the same windows.

    seed: of the training. Raises Interrupted when a stop is asked for.
    """
    model = checkpoint.model
    device = model.embedding.weight.device
    untrained = build_model(model.config, checkpoint.vocab_size, seed=seed).to(device)
    if model.side is not None and untrained.side is not None:
        untrained.side.load_state_dict(model.side.state_dict())
    after = measure_model(model, shards, windows, config, context, windows_before=0)
    before = measure_model(untrained, shards, windows, config, context, windows_before=len(windows))
    heads = chosen_heads(model.config.num_heads, config.heat_map_heads)
    taus, biases = lazy_parameters(model)
    return Measured(
        model=model.config,
        trained=after,
        untrained=before,
        attention_layers=model.attention_layers,
        taus=taus,
        biases=biases,
        untrained_biases=lazy_parameters(untrained)[1],
        maps=attention_maps(model, window_tokens(shards, windows[0], config, device), heads, config),
        heads=heads,
        seq_len=config.seq_len,
    )


def measure_model(
    model: Transformer,
    shards: TokenShards,
    windows: NDArray[np.int64],
    config: SparsityConfig,
    context: Context,
    windows_before: int,
) -> HeadMetrics:
    """Every attention metric [layers, H], averaged over the windows, NaN where a layer has no attention weights.

    `windows_before` counts another model's.
    """
    device, layers = model.embedding.weight.device, model.attention_layers
    measured = {name: np.full((model.config.num_layers, model.config.num_heads), np.nan) for name in MEASURES}
    per_window = []
    for index, window in enumerate(windows):
        if context.stop_requested:
            raise Interrupted(f"stopped after {windows_before + index} of {2 * len(windows)} windows")
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            tokens = window_tokens(shards, window, config, device)
            if layers:
                per_window.append(measure_windows(model.eval().attention_rows(tokens, config.query_block), layers))
        context.progress(windows_before + index + 1, 2 * len(windows), "windows")
    if per_window:
        for name, values in average_windows(per_window).items():
            measured[name][layers] = values
    return measured


def attention_maps(model: Transformer, tokens: Tensor, heads: list[int], config: SparsityConfig) -> Array:
    """Weights of `heads` among the first T <= 256 of tokens [1, L], float32 [layers, len(heads), T, T].

    Attention is causal: cutting the window there changes none of these weights. Zeros in layers without any.
    """
    shown = tokens[:, :HEAT_MAP_TOKENS]
    maps = np.zeros((model.config.num_layers, len(heads), shown.shape[1], shown.shape[1]), dtype=np.float32)
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
        for layer, start, weights in model.eval().attention_rows(shown, config.query_block):
            maps[layer, :, start : start + weights.shape[2]] = weights[0, heads].float().cpu().numpy()
    return maps


def chosen_heads(num_heads: int, count: int) -> list[int]:
    """`count` head numbers spread evenly over 0 ... num_heads - 1 (all of them when there are fewer)."""
    return sorted({round(head) for head in np.linspace(0, num_heads - 1, min(count, num_heads))})


def lazy_parameters(model: Transformer) -> tuple[Array | None, Array | None]:
    """(tau [layers, H], bias [layers, H, W]) as float64, NaN in a hybrid's other layers; None for what no layer has.

    A tau shared by the heads of a layer stands at each of them.
    """
    config = model.config
    taus = np.full((config.num_layers, config.num_heads), np.nan)
    biases = np.full((*taus.shape, config.max_bias_length), np.nan)
    for index, mixer in enumerate(model.mixers):
        tau, bias = mixer.tau_and_bias()
        if tau is not None:
            taus[index] = tau.detach().double().cpu().numpy()
        if bias is not None:
            biases[index] = bias.detach().double().cpu().numpy()
    return (None if np.isnan(taus).all() else taus), (None if np.isnan(biases).all() else biases)


def window_tokens(shards: TokenShards, window: int, config: SparsityConfig, device: torch.device) -> Tensor:
    """Inputs of a window, int64 [1, seq_len], without the last target."""
    return torch.from_numpy(read_window(shards, config.seq_len, int(window))[None, :-1]).to(device)
