"""The Triton backend as torch.library custom ops: opaque to torch.compile, differentiable, with fake kernels.

Importing this file does not import triton; running an op does.
"""

import torch
from torch import Tensor

from lazypipe.kernels.gpu.tiles import tile_for


def _mask_shape(q: Tensor, k: Tensor) -> tuple[int, int]:
    tile = tile_for("forward", q.shape[3], q.dtype, q.device)
    words = (k.shape[2] + 32 * tile.block_n - 1) // (32 * tile.block_n)
    return (q.shape[2] + tile.block_m - 1) // tile.block_m, words


@torch.library.custom_op("lazypipe::triton_forward", mutates_args=())
def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    tau: Tensor,
    cu_seqlens: Tensor | None,
    position_offset: int,
    scale: float,
    training: bool,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse in log2 units, M, surviving mass, number of positive weights, mask words); see launch_forward."""
    from lazypipe.kernels.gpu.launch import launch_forward

    result = launch_forward(q, k, v, bias.contiguous(), tau, cu_seqlens, position_offset, scale, training, return_stats)
    return (result.out, result.lse, result.mean, result.mass, result.used, result.words)


@triton_forward.register_fake
def _(q, k, v, bias, tau, cu_seqlens, position_offset, scale, training, return_stats):  # type: ignore[no-untyped-def]  # noqa: ARG001
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    mean = q.new_empty(q.shape if training else (0,), dtype=torch.float32)
    mass, used = (q.new_empty(q.shape[:3] if return_stats else (0,), dtype=torch.float32) for _ in range(2))
    words = q.new_empty((*q.shape[:2], *_mask_shape(q, k)), dtype=torch.int32)
    return q.new_empty(q.shape), lse, mean, mass, used, words


@torch.library.custom_op("lazypipe::triton_backward", mutates_args=())
def triton_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    tau: Tensor,
    cu_seqlens: Tensor | None,
    lse: Tensor,
    mean: Tensor,
    words: Tensor,
    position_offset: int,
    scale: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias, dtau); an entry of `need` that is False leaves an empty tensor in its place."""
    from lazypipe.kernels.gpu.launch import Saved, launch_bias, launch_key, launch_query, rows_contiguous

    need_q, need_k, need_v, need_bias, need_tau = need
    q, k, v, grad_out = (rows_contiguous(x) for x in (q, k, v, grad_out))
    saved = Saved(
        grad_out, q, k, v, bias.contiguous(), tau.contiguous(), cu_seqlens, lse, mean, words, position_offset, scale
    )
    dq, delta, da_sum = q.new_empty(0), lse, lse
    if need_q or need_k or need_bias or need_tau:
        dq, delta, da_sum = launch_query(saved, need_q)
    dk, dv = k.new_empty(0), v.new_empty(0)
    if need_k or need_v:
        dk, dv = launch_key(saved, delta, need_k, need_v)
    dbias = launch_bias(saved, delta) if need_bias else bias.new_empty(0)
    dtau = da_sum.sum((0, 2)) if need_tau else tau.new_empty(0)
    return dq, dk, dv, dbias, dtau


@triton_backward.register_fake
def _(grad_out, q, k, v, bias, tau, cu_seqlens, lse, mean, words, position_offset, scale, need):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return tuple(x.new_empty(x.shape if wanted else (0,)) for x, wanted in zip((q, k, v, bias, tau), need, strict=True))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, bias, tau, cu_seqlens, position_offset, scale, _, _ = inputs
    _, lse, mean, _, _, words = output
    ctx.save_for_backward(q, k, v, bias, tau, cu_seqlens, lse, mean, words)
    ctx.position_offset, ctx.scale = position_offset, scale
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_out, *_):  # type: ignore[no-untyped-def]
    need = [bool(flag) for flag in ctx.needs_input_grad[:5]]
    grads = triton_backward(grad_out, *ctx.saved_tensors, ctx.position_offset, ctx.scale, need)
    return (*(g if wanted else None for g, wanted in zip(grads, need, strict=True)), None, None, None, None, None)


triton_forward.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("lazypipe::triton_decode", mutates_args=())
def triton_decode(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tau: Tensor, position_offset: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, V rows read [B, Hkv] int64); see triton_decode.launch_decode. Not differentiable."""
    from lazypipe.kernels.gpu.decode import launch_decode

    return launch_decode(q, k, v, bias, tau, position_offset, scale)


@triton_decode.register_fake
def _(q, k, v, bias, tau, position_offset, scale):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return q.new_empty(q.shape), q.new_empty(k.shape[:2], dtype=torch.int64)


def active_blocks(words: Tensor, key_blocks: int) -> Tensor:
    """Mask words [..., W] int32 unpacked into [..., key_blocks] bool."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., :key_blocks].bool()
