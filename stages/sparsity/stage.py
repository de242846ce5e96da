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

from lazypipe.model.transformer import Transformer
from lazypipe.stages import metrics
from lazypipe.stages.contract import Artifact, Context, Outputs, UserError
from lazypipe.stages.data.batches import validation_windows
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.facts import SparsityFacts
from lazypipe.stages.figures.by_layer import LayerSeries, by_layer
from lazypipe.stages.model_checks import check_inference_kernels, load_model
from lazypipe.stages.sparsity.config import SparsityConfig
from lazypipe.stages.sparsity.figures import DRAWINGS
from lazypipe.stages.sparsity.measure import Measured, measure


def run(config: SparsityConfig, inputs: Mapping[str, Artifact], context: Context) -> Outputs[SparsityFacts]:
    """Measure attention metrics per layer and head of inputs["pretrain"] on the validation split of inputs["tokenize"].

    Writes tables/heads, tables/layers and figures/*.png. Raises UserError if the split has no window of seq_len tokens,
    the checkpoint's weights are not finite or Triton kernels are wrong on this GPU, Interrupted when a stop is asked
    for.
    """
    corpus, trained = inputs["tokenize"], inputs["pretrain"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = TokenShards(corpus.path / "validation")
    windows = validation_windows(shards, config.seq_len, config.windows)
    checkpoint = load_model(trained.path / "checkpoint", device)
    model = checkpoint.model
    refuse_diverged(model)
    refuse_length(config, model)
    warn_of_windows(config, len(windows), model, context)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    preflight = check_inference_kernels(model, dtype)  # each layer but the first reads what the kernel made
    seed = int(trained.manifest["config"]["seed"])

    measured = measure(checkpoint, seed, shards, windows, config, context)
    log_tables(measured, context)
    log_figures(measured, context)
    facts = SparsityFacts(
        windows=len(windows),
        windows_asked=config.windows,
        seq_len=config.seq_len,
        beyond_max_seq_len=config.seq_len > model.config.max_seq_len,
        untrained_seed=seed,
        heat_map_heads=measured.heads,
        mixer=model.config.mixer,
        pattern=model.config.model_dump(mode="json")["pattern"],
        attention_layers=measured.attention_layers,
        threads=torch.get_num_threads(),
        device=str(device),
        preflight=None if preflight is None else preflight.description,
        preflight_errors=None if preflight is None else preflight.errors,
        preflight_bound=None if preflight is None else preflight.bound,
    )
    return Outputs(attention_means(measured) | learned(measured), facts)


def refuse_diverged(model: Transformer) -> None:
    """UserError for weights that are not finite."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(
                f"parameter {name} of the checkpoint is not finite: training has diverged; "
                "lower pretrain.lr, lengthen pretrain.warmup_steps, or lower pretrain.grad_clip"
            )


def refuse_length(config: SparsityConfig, model: Transformer) -> None:
    """UserError for windows that this model cannot read at all."""
    too_long = model.config.too_long(config.seq_len)
    if too_long is not None:
        raise UserError(f"sparsity.seq_len: {too_long}")


def warn_of_windows(config: SparsityConfig, windows: int, model: Transformer, context: Context) -> None:
    """Warn of fewer windows than asked for, and of longer ones than the model was meant for."""
    if windows < config.windows:
        context.warn(
            f"the validation split holds {windows} windows of seq_len={config.seq_len}, "
            f"{config.windows} were asked for; the attention is measured on these {windows}"
        )
    if config.seq_len > model.config.max_seq_len:
        context.warn(
            f"sparsity.seq_len={config.seq_len} is above model.max_seq_len={model.config.max_seq_len}: "
            "the attention is measured on longer windows than the model was meant for"
        )


def attention_means(measured: Measured) -> dict[str, float]:
    """The declared metrics of attention weights, means over layers and heads; some also of each layer.

    Layers without attention weights have no part in it; of a model without any, nothing is left.
    """
    means: dict[str, float | None] = {}
    for metric in metrics.ATTENTION:
        if metric.untrained:
            means[metric.name] = _mean(measured.untrained[metric.untrained])
            continue
        values = measured.trained[metric.name]
        means[metric.name] = _mean(values)
        if metric.by_layer is not None:
            means |= {f"{metric.name}/layer_{layer}": _mean(heads) for layer, heads in enumerate(values)}
    return {name: value for name, value in means.items() if value is not None}


def learned(measured: Measured) -> dict[str, float]:
    """The declared metrics of what Lazy Attention learns: thresholds and distance biases; {} without any."""
    values: dict[metrics.Metric, Any] = {}
    taus, biases = measured.taus, measured.biases
    if taus is not None:
        values |= {
            metrics.TAU_MEAN: np.nanmean(taus),
            metrics.TAU_MIN: np.nanmin(taus),
            metrics.TAU_MAX: np.nanmax(taus),
            metrics.TAU_MOVED: np.nanmax(np.abs(taus - measured.model.tau_init)),
        }
    if biases is not None:
        values |= {
            metrics.BIAS_MAX: np.nanmax(np.abs(biases)),
            metrics.BIAS_MOVED: np.nanmax(np.abs(biases - measured.untrained_biases)),
        }
    return {metric.name: float(value) for metric, value in values.items()}


def log_tables(measured: Measured, context: Context) -> None:
    """tables/heads and tables/layers: a column per declared metric, some also before training, and tau; null: none."""
    columns: dict[str, NDArray[Any]] = {}  # [layers, H]
    for metric in metrics.ATTENTION:
        if not metric.untrained:
            columns[metric.name] = measured.trained[metric.name]
        if metric.by_layer is not None:
            columns[f"untrained_{metric.name}"] = measured.untrained[metric.name]
    shape = (measured.model.num_layers, measured.model.num_heads)
    columns["tau"] = np.full(shape, np.nan) if measured.taus is None else measured.taus
    head_rows = [
        {"layer": layer, "head": head, **{name: _number(values[layer, head]) for name, values in columns.items()}}
        for layer in range(shape[0])
        for head in range(shape[1])
    ]
    layer_rows = [
        {"layer": layer, **{name: _mean(values[layer]) for name, values in columns.items()}}
        for layer in range(shape[0])
    ]
    context.log_table("heads", head_rows)
    context.log_table("layers", layer_rows)


def log_figures(measured: Measured, context: Context) -> None:
    """The figures by layer that metrics declare, and the stage's own; of a model without attention weights, none."""
    for metric in metrics.ATTENTION:
        if metric.by_layer is not None and measured.attention_layers:
            series = LayerSeries("mean over heads", measured.trained[metric.name], measured.untrained[metric.name])
            context.log_figure(f"{metric.name}_by_layer", by_layer([series], metric.by_layer))
    for listed, draw in DRAWINGS.items():
        for number, figure in draw(measured):
            context.log_figure(listed.name.replace("*", str(number)), figure)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _mean(values: NDArray[Any]) -> float | None:
    """Mean of the finite values; None when there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
