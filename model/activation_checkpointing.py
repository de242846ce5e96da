"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): blocks computed again in the backward pass.

    block      of every block only its input is kept
    selective  of every block also what is dear to compute again and small to keep: outputs of matrix products with
               weights and of fused attention, as torchtitan's per-op policy does (it keeps every second product).
               Norms, RoPE, activations and everything over pairs of positions (bmm) are computed again.

Nothing in a block draws random numbers, so on one machine the gradients are those without checkpointing, bit for bit.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lazypipe.kernels  # noqa: F401  (it registers the last two operators of KEPT)
from lazypipe.model.mixers.base import BlockInputs, BlockOutputs

KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.lazypipe.blockwise.default,
    torch.ops.lazypipe.triton_forward.default,
}


def checkpointed(
    block: Callable[[Tensor, BlockInputs], BlockOutputs], x: Tensor, inputs: BlockInputs, selective: bool
) -> BlockOutputs:
    """block(x, inputs), whose intermediate tensors are made again when the backward pass needs them."""
    outputs: BlockOutputs
    if selective:
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        outputs = checkpoint(block, x, inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    else:
        outputs = checkpoint(block, x, inputs, use_reentrant=False, preserve_rng_state=False)
    return outputs


def _policy(_context: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
