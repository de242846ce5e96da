"""What training logs: of a step, of attention layer by layer, and of the whole run."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lazypipe.model.config import ModelConfig
from lazypipe.model.transformer import Transformer
from lazypipe.stages.data.batches import document_borders
from lazypipe.stages.pretrain.hardware import Machine, peak_memory_gb

# Sparsity and sink are measured on this many validation windows at validations and at every tenth logged step.
# Fixed windows make the curve smooth.
SAMPLE_WINDOWS = 2
SAMPLE_EVERY = 10


@dataclass(kw_only=True)
class StepMetrics:
    """What is measured of one optimizer step, the columns of tables/history. Losses in nats; None: not measured.

    loss               cross-entropy, mean over the predictions of the step
    lr                 learning rate; lr_tau_bias that of tau and the distance bias, where it is another one
    grad_norm          Euclidean norm of all gradients, before clipping
    validation_loss    mean over the validation windows
    sink_balance_loss  head balance of `sink`, times its weight; z_loss likewise
    step_seconds       duration of the step; data_wait is the share of it spent on making batches
    peak_memory_gb     highest memory of this worker so far, 10^9 bytes
    mfu                model FLOP utilisation, where the peak of the GPU is known
    """

    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    validation_loss: float | None = None
    lr_tau_bias: float | None = None
    sink_balance_loss: float | None = None
    z_loss: float | None = None
    step_seconds: float
    data_wait: float
    peak_memory_gb: float | None = None
    mfu: float | None = None

    def row(self) -> dict[str, float | None]:
        """The columns by name; null what is not finite or, of a run that has the column, not measured at this step."""
        optional = {"lr_tau_bias", "sink_balance_loss", "z_loss", "mfu"}
        columns = {name: value for name, value in vars(self).items() if value is not None or name not in optional}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in columns.items()}


def run_metrics(machine: Machine, tokens: int, seconds: float, waited: float, device: torch.device) -> dict[str, float]:
    """Final metrics of a run of `tokens` tokens in `seconds`, `waited` of them for batches; without validation and
    checkpoints.
    """
    metrics = {
        "tokens_per_s": tokens / seconds,
        "train_seconds": seconds,
        "data_wait": waited / seconds,
        "peak_memory_gb": peak_memory_gb(device),
    }
    mfu = machine.utilisation(tokens / seconds)
    return metrics if mfu is None else metrics | {"mfu": mfu}


def thresholds_by_layer(model: Transformer) -> dict[str, float]:
    """tau/layer_<i>, mean over heads, of the layers of Lazy Attention that have thresholds."""
    return {
        f"tau/layer_{index}": tau.mean().item()
        for index, mixer in enumerate(model.mixers)
        if (tau := mixer.tau_and_bias()[0]) is not None
    }


def attention_by_layer(model: Transformer, windows: npt.NDArray[np.int64], eos_id: int | None) -> dict[str, float]:
    """sparsity/layer_<i>, the share of exactly-zero weights (of mechanisms that can have zeros), and sink/layer_<i>,
    the mean weight on the first key a query sees, on windows int64 [n, L + 1].

    eos_id: with it attention stays within documents. {} of a baseline, which has no weights.
    """
    if model.config.mechanism.whole_model:
        return {}
    tokens = torch.from_numpy(windows[:, :-1]).to(model.embedding.weight.device)
    if eos_id is None:
        statistics = model.statistics_by_layer(tokens)
    else:
        borders = torch.from_numpy(document_borders(windows, eos_id))
        statistics = model.statistics_by_layer(tokens.reshape(1, -1), borders)
    return {
        f"{name}/layer_{index}": value
        for name, values in zip(("sparsity", "sink"), zip(*statistics, strict=True), strict=True)
        for index, value in enumerate(values)
        if value is not None
    }


def means_over_layers(by_layer: dict[str, float], model: ModelConfig) -> dict[str, float | None]:
    """Columns of the history table, null where not measured: sink, and of a lazy model tau_mean and sparsity."""
    columns = [] if model.mechanism.whole_model else [("sink", "sink/")]
    if model.mechanism.has_tau(model):
        columns += [("tau_mean", "tau/"), ("sparsity", "sparsity/")]
    means: dict[str, float | None] = {}
    for column, prefix in columns:
        values = [value for name, value in by_layer.items() if name.startswith(prefix)]
        means[column] = sum(values) / len(values) if values else None
    return means
