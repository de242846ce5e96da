"""Sparsity stage: what the attention weights of a trained model look like on held-out text.

Windows of `seq_len` tokens, evenly spread over the validation split, go through the model one at a time; at most
[H, query_block, seq_len] weights exist at once. The untrained model of the same architecture and seed goes through the
same windows and the same code: random scores under tau = -1 are already 50 to 69 % exact zeros, so a sparsity means
little without that number beside it. A layer without attention weights (mlp) has nulls in the tables, no figure, and
no part in the means. A window is a stretch of the packed token stream; it may hold a document border,
which attention crosses here as in training; a model trained with document_masking meets it here for the first time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lazypipe.model.baselines import build_model
from lazypipe.model.mixers.lazy import LazyAttention
from lazypipe.model.transformer import Transformer
from lazypipe.stages import figures
from lazypipe.stages.baselines import load_model
from lazypipe.stages.contract import Artifact, Context, Interrupted, Outputs, UserError
from lazypipe.stages.data.batches import read_window, validation_windows
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.facts import SparsityFacts
from lazypipe.stages.kernel_check import check_inference_kernels
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.sparsity.config import SparsityConfig
from lazypipe.stages.sparsity.metrics import METRICS, average_windows, measure_windows

HEAT_MAP_TOKENS = 256  # a figure of more tokens than pixels would have to merge weights, zeros among them

Array = NDArray[Any]
HeadMetrics = dict[str, NDArray[np.float64]]  # name -> [layers, H], NaN in layers without attention weights


def run(config: SparsityConfig, inputs: Mapping[str, Artifact], context: Context) -> Outputs[SparsityFacts]:
    """Measure attention metrics per layer and head of inputs["pretrain"] on the validation split of inputs["tokenize"].

    Writes tables/heads, tables/layers and figures/*.png. Raises UserError if the split has no window of seq_len tokens,
    the checkpoint's weights are not finite or Triton kernels are wrong on this GPU, Interrupted when a stop is asked
    for.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = TokenShards(inputs["tokenize"].path / "validation")
    windows = validation_windows(shards, config.seq_len, config.windows)
    if len(windows) < config.windows:
        context.warn(
            f"the validation split holds {len(windows)} windows of seq_len={config.seq_len}, "
            f"{config.windows} were asked for; the attention is measured on these {len(windows)}"
        )
    checkpoint = load_model(inputs["pretrain"].path / "checkpoint", device)
    model = checkpoint.model
    _refuse_diverged(model)
    too_long = model.config.too_long(config.seq_len)
    if too_long is not None:
        raise UserError(f"sparsity.seq_len: {too_long}")
    beyond_training = config.seq_len > model.config.max_seq_len
    if beyond_training:
        context.warn(
            f"sparsity.seq_len={config.seq_len} is above model.max_seq_len={model.config.max_seq_len}: "
            "the attention is measured on longer windows than the model was meant for"
        )
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    preflight = check_inference_kernels(model, dtype)  # each layer but the first reads what the kernel made
    seed = int(inputs["pretrain"].manifest.get("config", {}).get("seed", PretrainConfig().seed))
    untrained = build_model(model.config, checkpoint.vocab_size, seed=seed).to(device)
    if model.side is not None and untrained.side is not None:
        untrained.side.load_state_dict(model.side.state_dict())

    trained = measure_model(model, shards, windows, config, context, windows_before=0)
    before = measure_model(untrained, shards, windows, config, context, windows_before=len(windows))
    heads = chosen_heads(model.config.num_heads, config.heat_map_heads)
    maps = attention_maps(model, _window_tokens(shards, windows[0], config, device), heads, config)

    taus, biases = lazy_parameters(model)
    _log_tables(context, trained, before, taus)
    if model.attention_layers:
        _log_figures(context, trained, before, {layer: maps[layer] for layer in model.attention_layers}, heads, config)
    metrics = summary(trained, before)
    if taus is not None:
        tau_init = model.config.tau_init
        metrics |= {
            "tau_mean": float(np.nanmean(taus)),
            "tau_min": float(np.nanmin(taus)),
            "tau_max": float(np.nanmax(taus)),
            "tau_moved": float(np.nanmax(np.abs(taus - tau_init))),
        }
        relative = model.config.lazy_threshold == "relative"
        context.log_figure("tau_heat_map", figures.tau_heat_map(taus, tau_init, relative))
    if biases is not None:
        _, initial_biases = lazy_parameters(untrained)
        metrics |= {
            "bias_max": float(np.nanmax(np.abs(biases))),
            "bias_moved": float(np.nanmax(np.abs(biases - initial_biases))),
        }
        context.log_figure("bias_curves", figures.bias_curves(biases))
    facts = SparsityFacts(
        windows=len(windows),
        windows_asked=config.windows,
        seq_len=config.seq_len,
        beyond_max_seq_len=beyond_training,
        untrained_seed=seed,
        heat_map_heads=heads,
        mixer=model.config.mixer,
        pattern=model.config.model_dump(mode="json")["pattern"],
        attention_layers=model.attention_layers,
        threads=torch.get_num_threads(),
        device=str(device),
        preflight=None if preflight is None else preflight.description,
        preflight_errors=None if preflight is None else preflight.errors,
        preflight_bound=None if preflight is None else preflight.bound,
    )
    return Outputs(metrics, facts)


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
    measured = {name: np.full((model.config.num_layers, model.config.num_heads), np.nan) for name in METRICS}
    per_window = []
    for index, window in enumerate(windows):
        if context.stop_requested:
            raise Interrupted(f"stopped after {windows_before + index} of {2 * len(windows)} windows")
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            tokens = _window_tokens(shards, window, config, device)
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
    for index, layer in enumerate(model.layers):
        mixer = layer.get_submodule("mixer")
        if isinstance(mixer, LazyAttention):
            if mixer.tau is not None:
                taus[index] = mixer.tau.detach().double().cpu().numpy()
            if mixer.bias is not None:
                biases[index] = mixer.bias.detach().double().cpu().numpy()
    return (None if np.isnan(taus).all() else taus), (None if np.isnan(biases).all() else biases)


def summary(trained: HeadMetrics, before: HeadMetrics) -> dict[str, float]:
    """Every metric averaged over layers and heads, the untrained sparsity, and sparsity and sink of each layer."""
    means = {name: _mean(values) for name, values in trained.items()}
    means["untrained_sparsity"] = _mean(before["sparsity"])
    # The layers without attention weights are left out, of the means and here.
    for name in ("sparsity", "sink"):
        for layer, values in enumerate(trained[name]):
            means[f"{name}/layer_{layer}"] = _mean(values)
    return {name: value for name, value in means.items() if value is not None}


def _log_tables(context: Context, trained: HeadMetrics, before: HeadMetrics, taus: Array | None) -> None:
    layers, num_heads = trained["sparsity"].shape
    head_rows = [
        {
            "layer": layer,
            "head": head,
            **{name: _number(values[layer, head]) for name, values in trained.items()},
            "untrained_sparsity": _number(before["sparsity"][layer, head]),
            "untrained_sink": _number(before["sink"][layer, head]),
            "tau": None if taus is None else _number(taus[layer, head]),
        }
        for layer in range(layers)
        for head in range(num_heads)
    ]
    layer_rows = [
        {
            "layer": layer,
            **{name: _mean(values[layer]) for name, values in trained.items()},
            "untrained_sparsity": _mean(before["sparsity"][layer]),
            "untrained_sink": _mean(before["sink"][layer]),
            "tau": None if taus is None else _mean(taus[layer]),
        }
        for layer in range(layers)
    ]
    context.log_table("heads", head_rows)
    context.log_table("layers", layer_rows)


def _log_figures(
    context: Context,
    trained: HeadMetrics,
    before: HeadMetrics,
    maps: Mapping[int, Array],
    heads: list[int],
    config: SparsityConfig,
) -> None:
    series = {
        name: [figures.LayerSeries("mean over heads", trained[name], before[name])] for name in ("sparsity", "sink")
    }
    context.log_figure("sparsity_by_layer", figures.sparsity_by_layer(series["sparsity"]))
    context.log_figure("sink_by_layer", figures.sink_by_layer(series["sink"]))
    if heads:
        for layer, weights in maps.items():
            figure = figures.attention_heat_map(weights, layer, heads, config.seq_len)
            context.log_figure(f"attention_layer_{layer}", figure)


def _window_tokens(shards: TokenShards, window: int, config: SparsityConfig, device: torch.device) -> Tensor:
    """Inputs of a window, int64 [1, seq_len], without the last target."""
    return torch.from_numpy(read_window(shards, config.seq_len, int(window))[None, :-1]).to(device)


def _refuse_diverged(model: Transformer) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(
                f"parameter {name} of the checkpoint is not finite: training has diverged; "
                "lower pretrain.lr, lengthen pretrain.warmup_steps, or lower pretrain.grad_clip"
            )


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _mean(values: Array) -> float | None:
    """Mean of the finite values; None when there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
