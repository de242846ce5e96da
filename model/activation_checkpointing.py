"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): blocks computed again in the backward pass.

    block      of every block only its input is kept
    selective  of every block also what is dear to compute again and small to keep: outputs of matrix products with
               weights and of fused attention, as torchtitan's per-op policy does (it keeps every second product).
               Norms, RoPE, activations and everything over pairs of positions (bmm) are computed again.

Nothing in a block draws random numbers, so on one machine the gradients are those without checkpointing, bit for bit.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lazypipe.kernels  # noqa: F401  (it registers the last two operators of KEPT)
from lazypipe.model.mixers.base import SideInputs, TokenMixer
from lazypipe.model.rope import Rope

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
    block: Callable[[Tensor, Rope, None, SideInputs], Tensor],
    mixer: TokenMixer,
    x: Tensor,
    rope: Rope,
    side: SideInputs,
    selective: bool,
) -> Tensor:
    """block(x, rope, None, side), whose intermediate tensors are made again when the backward pass needs them.

    The second pass finds the side inputs as the first did, and leaves nothing in `side`.
    """
    # As they are now: `side` moves on with the layers, and the second pass comes after all of them.
    found = replace(side, values=side.values if mixer.reads_values else None)

    def run(x: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        own = replace(found, head_mass=None if found.head_mass is None else [])
        out = block(x, rope, None, own)
        return out, own.values, own.head_mass or []

    out: Tensor
    if selective:
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        out, left, head_mass = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    else:
        out, left, head_mass = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    side.values = side.values if left is None else left
    if side.head_mass is not None:
        side.head_mass += head_mass
    return out


def _policy(_context: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
