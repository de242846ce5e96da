"""Lazy Attention on a CPU: one strip of query rows at a time, in O(L x block) memory, with a fused backward.

A strip is BLOCK query rows of a few heads against every key they may see. Holding whole rows lets torch's fused softmax
and softmax-backward do in one pass over memory what tiles would do in several, and leaves 2 + 5 matrix products, as
many as FlashAttention. Key blocks that Elastic-Softmax empties are found from row maxima right after the softmax; the V
product of the forward and the dV and dO.V products of the backward skip them. The backward keeps nothing but the inputs
and the block mask. Strips run one after the other in a fixed order: results repeat bitwise for a given thread count.
"""

import torch
from torch import Tensor

from kernels.strips import (
    BLOCK,
    Problem,
    Strip,
    active_blocks,
    active_runs,
    band_columns,
    band_gradient,
    carve,
    prepare,
    stacked_rows,
    strip_scores,
    strip_weights,
    view5,
)


@torch.library.custom_op("lazypipe::blockwise", mutates_args=())
def blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    tau: Tensor,
    cu_seqlens: Tensor | None,
    position_offset: int,
    scale: float,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, surviving_mass, row_sparsity, block_mask); lse, mass and sparsity are empty without `return_stats`."""
    p = prepare(q, k, v, bias, tau, cu_seqlens, position_offset, scale)
    layout = p.q.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype)
    key_blocks = -(-k.shape[2] // BLOCK)
    mask = torch.zeros(*q.shape[:2], -(-q.shape[2] // BLOCK), key_blocks, dtype=torch.bool)
    stat_shape = q.shape[:3] if return_stats else (0,)
    row_lse, row_mass, row_sparsity = (torch.empty(stat_shape, dtype=torch.float32) for _ in range(3))
    # Looking for empty blocks costs a pass over the strip; two or three blocks a row cannot repay it.
    look = return_stats or (key_blocks > 3 and p.some_tau_negative)
    spaces = [torch.empty(p.largest_strip, dtype=p.q.dtype) for _ in range(2)]

    for s in p.strips:
        scores = strip_scores(p, s, stacked_rows(s, p.q), spaces[0])
        probs = carve(spaces[1], scores.shape)
        torch.ops.aten._softmax.out(scores, -1, False, out=probs)
        strip_mask = torch.unflatten(mask, 1, layout)[
            s.batches, s.heads, :, s.row0 // BLOCK, s.key0 // BLOCK : -(-s.key1 // BLOCK)
        ]
        runs = [(0, s.key1 - s.key0)]
        if look:
            strip_mask.copy_(active_blocks(p, s, probs))
            runs = active_runs(strip_mask, s)
        else:
            strip_mask.fill_(True)
        lse = torch.logsumexp(scores, dim=-1, keepdim=True) if return_stats else None
        result = scores.new_zeros(*scores.shape[:2], q.shape[3])
        mass, used = scores.new_zeros(2, *scores.shape[:2], 1)
        for run in runs:
            weights = strip_weights(p, s, probs, run, spaces[0])  # the scores are done with
            result.baddbmm_(weights, p.v[s.pair0 : s.pair1, s.key0 + run[0] : s.key0 + run[1]])
            if lse is not None:
                mass += weights.sum(-1, keepdim=True)
                used += (weights > 0).sum(-1, keepdim=True)
        _rows(out, layout, s).copy_(view5(p, s, result))
        if lse is not None:
            _rows(row_lse, layout, s).copy_(view5(p, s, lse).squeeze(-1))
            _rows(row_mass, layout, s).copy_(view5(p, s, mass).squeeze(-1))
            _rows(row_sparsity, layout, s).copy_(1.0 - view5(p, s, used).squeeze(-1) / _visible_count(p, s))
    return out, row_lse, row_mass, row_sparsity, mask


def _rows(x: Tensor, layout: torch.Size, s: Strip) -> Tensor:
    """The strip's rows of x [B, Hq, Lq, ...], as [batches, heads, group, rows, ...]."""
    return torch.unflatten(x, 1, layout)[s.batches, s.heads, :, s.row0 : s.row1]


def _visible_count(p: Problem, s: Strip) -> Tensor:
    """Number of keys at hand each row of the strip may attend to, [rows]: n_i without the evicted ones."""
    return p.token_count[s.row0 : s.row1] - p.position_offset


@blockwise.register_fake
def _(q, k, v, bias, tau, cu_seqlens, position_offset, scale, return_stats):  # type: ignore[no-untyped-def]  # noqa: ARG001
    stat_shape = q.shape[:3] if return_stats else (0,)
    lse, mass, sparsity = (q.new_empty(stat_shape, dtype=torch.float32) for _ in range(3))
    blocks = ((q.shape[2] + BLOCK - 1) // BLOCK, (k.shape[2] + BLOCK - 1) // BLOCK)
    mask = q.new_empty((q.shape[0], q.shape[1], *blocks), dtype=torch.bool)
    return q.new_empty(q.shape), lse, mass, sparsity, mask


@torch.library.custom_op("lazypipe::blockwise_backward", mutates_args=())
def blockwise_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    tau: Tensor,
    cu_seqlens: Tensor | None,
    block_mask: Tensor,
    position_offset: int,
    scale: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias, dtau); an entry of `need` that is False leaves an empty tensor in its place.

    ds = p (dp - sum_j p dp) with dp = dO.V where the weight is positive: torch's softmax backward applied to dp,
    which is zero, and not computed, in empty blocks.
    """
    p = prepare(q, k, v, bias, tau, cu_seqlens, position_offset, scale)
    need_q, need_k, need_v, need_bias, need_tau = need
    need_scores = need_q or need_k or need_bias
    layout, dtype = p.q.shape[1:3], p.q.dtype
    grads = torch.unflatten(grad_out.to(dtype), 1, layout)
    dq = torch.zeros(q.shape if need_q else (0,), dtype=q.dtype)
    dk = torch.zeros(p.k.shape if need_k else (0,), dtype=dtype)
    dv = torch.zeros(p.v.shape if need_v else (0,), dtype=dtype)
    band_grad = torch.zeros(p.band.shape if need_bias else (0,), dtype=dtype)
    da_sums = torch.zeros(q.shape[:3] if need_tau else (0,), dtype=dtype)
    spaces = [torch.empty(p.largest_strip, dtype=dtype) for _ in range(3)]

    for s in p.strips:
        pairs, width = slice(s.pair0, s.pair1), s.key1 - s.key0
        strip_mask = torch.unflatten(block_mask, 1, layout)[
            s.batches, s.heads, :, s.row0 // BLOCK, s.key0 // BLOCK : -(-s.key1 // BLOCK)
        ]
        runs = active_runs(strip_mask, s)
        if not runs:  # every weight is zero, so dp, D and ds are too
            continue
        rows_q, rows_g = stacked_rows(s, p.q), stacked_rows(s, grads)
        scores = strip_scores(p, s, rows_q, spaces[0])
        probs = carve(spaces[1], scores.shape)
        torch.ops.aten._softmax.out(scores, -1, False, out=probs)
        dp = carve(spaces[2], scores.shape)
        everywhere = runs == [(0, width)]
        if not everywhere:
            dp.zero_()
        for run in runs:
            keys = slice(s.key0 + run[0], s.key0 + run[1])
            weights = strip_weights(p, s, probs, run, spaces[0])
            if need_v:
                dv[pairs, keys].baddbmm_(weights.mT, rows_g)
            if not (need_scores or need_tau):
                continue
            da = dp if everywhere else torch.empty_like(weights)
            torch.bmm(rows_g, p.v[pairs, keys].mT, out=da)
            dp_run = dp[..., run[0] : run[1]]
            torch.ops.aten.threshold_backward.grad_input(da, weights, 0, grad_input=dp_run)
        if need_tau:
            _rows(da_sums, layout, s).copy_(view5(p, s, dp.sum(-1, keepdim=True)).squeeze(-1))
        if not need_scores:
            continue
        ds = carve(spaces[0], scores.shape)
        torch.ops.aten._softmax_backward_data.out(dp, probs, -1, dtype, grad_input=ds)
        if need_q:
            _rows(dq, layout, s).copy_(view5(p, s, torch.bmm(ds, p.k[pairs, s.key0 : s.key1]).mul_(scale)))
        if need_k:
            dk[pairs, s.key0 : s.key1].baddbmm_(ds.mT, rows_q)
        if need_bias:
            covered, columns = band_columns(p, s)
            part = view5(p, s, ds)[..., -covered:]
            band_grad[s.heads, :, : s.row1 - s.row0, columns].add_(part[0] if part.shape[0] == 1 else part.sum(0))
    dbias = band_gradient(band_grad.flatten(0, 1), bias.shape[1]) if need_bias else band_grad
    dtau = (da_sums / p.token_count).sum((0, 2)) if need_tau else da_sums
    dk, dv = (x.view(shape) if x.numel() else x for x, shape in ((dk, k.shape), (dv, v.shape)))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias.to(bias.dtype), dtau.to(tau.dtype)


@blockwise_backward.register_fake
def _(grad_out, q, k, v, bias, tau, cu_seqlens, block_mask, position_offset, scale, need):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return tuple(x.new_empty(x.shape if wanted else (0,)) for x, wanted in zip((q, k, v, bias, tau), need, strict=True))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, bias, tau, cu_seqlens, position_offset, scale, _ = inputs
    ctx.save_for_backward(q, k, v, bias, tau, cu_seqlens, output[4])
    ctx.position_offset, ctx.scale = position_offset, scale
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_out, *_):  # type: ignore[no-untyped-def]
    q, k, v, bias, tau, cu_seqlens, block_mask = ctx.saved_tensors
    need = [bool(flag) for flag in ctx.needs_input_grad[:5]]
    grads = blockwise_backward(
        grad_out, q, k, v, bias, tau, cu_seqlens, block_mask, ctx.position_offset, ctx.scale, need
    )
    return (*(g if wanted else None for g, wanted in zip(grads, need, strict=True)), None, None, None, None)


blockwise.register_autograd(_backward, setup_context=_save)
