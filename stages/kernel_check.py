"""Before a stage computes on a GPU: are the Triton kernels right there, at the model's shape and dtype?"""

from __future__ import annotations

import torch

from lazypipe.kernels.api import uses_triton
from lazypipe.kernels.gpu.preflight import Preflight, PreflightError, inference_preflight
from lazypipe.model.mixers.registry import mechanism
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import UserError


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
