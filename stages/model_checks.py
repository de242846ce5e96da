"""Before a stage computes with a model: is what it needs here, and are the Triton kernels right?"""

from __future__ import annotations

from pathlib import Path

import torch

from lazypipe.kernels.api import uses_triton
from lazypipe.kernels.gpu.preflight import Preflight, PreflightError, inference_preflight
from lazypipe.model.baselines import BaselineError, check_baseline
from lazypipe.model.checkpoint import Checkpoint, load_checkpoint
from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.registry import mechanism
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import UserError


def refuse_baseline(model: ModelConfig, device: torch.device) -> None:
    """UserError when `model` is a baseline and its package, or a GPU for it, is missing here."""
    try:
        check_baseline(model, device)
    except BaselineError as error:
        raise UserError(str(error)) from error


def load_model(directory: Path, device: torch.device) -> Checkpoint:
    """`load_checkpoint`, whose BaselineError becomes a UserError."""
    try:
        return load_checkpoint(directory, device)
    except BaselineError as error:
        raise UserError(str(error)) from error


def check_inference_kernels(model: Transformer, dtype: torch.dtype) -> Preflight | None:
    """The preflight of a trained model that computes in `dtype` without gradients: reading and decoding.

    None where no Triton kernel runs (no GPU, no lazy layer, another backend). Computed once per process for each
    shape, dtype and device. UserError when the kernels are off by more than the bound.
    """
    config, device = model.config, model.embedding.weight.device
    layers = zip(config.layer_mixers, model.mixers, strict=False)  # a baseline has no mixers
    kernels = {mixer.kernel for name, mixer in layers if mechanism(name).has_kernel(config)}
    if not any(uses_triton(kernel, config.head_dim, dtype, device) for kernel in kernels):
        return None
    try:
        return inference_preflight(
            config.num_heads, config.kv_heads, config.head_dim, config.max_bias_length, dtype, device
        )
    except PreflightError as error:
        raise UserError(str(error)) from error
