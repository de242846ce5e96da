"""Lazy Attention on a CPU: one strip of query rows at a time, in O(L x block) memory, with a fused backward.

A strip is BLOCK query rows of a few heads against every key they may see. Whole rows need no running maximum, let
torch's fused softmax backward make ds in one pass over memory, and leave 2 + 5 matrix products, as many as
FlashAttention. Key blocks that Elastic-Softmax empties are found from row maxima; the V product of the forward and the
dV and dO.V products of the backward skip them. The backward keeps nothing but the inputs, the lse and the block mask.
Heads are tasks, side by side on one core each (`kernels.lanes`), and the strips of a task run in a fixed order: results
repeat bitwise for a given thread count.
"""

import functools

import torch
from torch import Tensor

from kernels.lanes import run_side_by_side
from kernels.strips import (
    BLOCK,
    LOG2_E,
    Problem,
    Strip,
    active_runs,
    band_columns,
    band_gradient,
    block_peaks,
    carve,
    prepare,
    scratch,
    stacked_rows,
    strip_probs,
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
    """(out, lse, surviving_mass, row_sparsity, block_mask), lse [B, Hq, Lq] in log2 units and the compute dtype.

    mass and sparsity are empty without `return_stats`.
    """
    p = prepare(q, k, v, bias, tau, cu_seqlens, position_offset, scale)
    layout, dtype = p.q.shape[1:3], p.q.dtype
    out = torch.empty(q.shape, dtype=q.dtype)
    key_blocks = -(-k.shape[2] // BLOCK)
    mask = torch.zeros(*q.shape[:2], -(-q.shape[2] // BLOCK), key_blocks, dtype=torch.bool)
    lse = torch.empty(q.shape[:3], dtype=dtype)
    stat_shape = q.shape[:3] if return_stats else (0,)
    row_mass, row_sparsity = (torch.empty(stat_shape, dtype=torch.float32) for _ in range(2))
    # Looking for empty blocks takes a few calls a strip; two or three blocks cannot repay them.
    look = return_stats or (key_blocks > 3 and p.some_tau_negative)

    def run_task(task: list[Strip]) -> None:
        spaces = scratch(p, task, 2)
        for s in task:
            run_strip(s, spaces)

    def run_strip(s: Strip, spaces: list[Tensor]) -> None:
        scores = strip_scores(p, s, stacked_rows(s, p.q), spaces[0])
        peaks = block_peaks(scores) if look else scores.amax(-1, keepdim=True)
        row_max = peaks.amax(-1, keepdim=True) if look else peaks
        probs = scores.sub_(row_max).exp2_()  # times `total`, as are the weights: only the output is divided
        total = probs.sum(-1, keepdim=True)
        thresholds = p.thresholds[s.heads, :, s.row0 : s.row1] * view5(p, s, total)
        strip_mask = _blocks(mask, layout, s)
        if look:
            # exp2 may differ in its last bit between the peaks and the strip: 1e-6 more never drops an active pair.
            highest = view5(p, s, peaks.sub(row_max).exp2_().mul_(1.0 + 1e-6))
            strip_mask.copy_((highest + thresholds > 0).any(-2))
            runs = active_runs(strip_mask, s)
        else:
            strip_mask.fill_(True)
            runs = [(0, s.key1 - s.key0)]
        result = scores.new_zeros(*scores.shape[:2], q.shape[3])
        mass, used = scores.new_zeros(2, *scores.shape[:2], 1)
        for run in runs:
            weights = strip_weights(p, s, probs, thresholds, run, spaces[1])
            result.baddbmm_(weights, p.v[s.pair0 : s.pair1, s.key0 + run[0] : s.key0 + run[1]])
            if return_stats:
                mass += weights.sum(-1, keepdim=True)
                used += (weights > 0).sum(-1, keepdim=True)
        _rows(out, layout, s).copy_(view5(p, s, result.div_(total)))
        _rows(lse, layout, s).copy_(view5(p, s, total.log2() + row_max).squeeze(-1))
        if return_stats:
            _rows(row_mass, layout, s).copy_(view5(p, s, mass / total).squeeze(-1))
            _rows(row_sparsity, layout, s).copy_(1.0 - view5(p, s, used).squeeze(-1) / _visible_count(p, s))

    run_side_by_side([functools.partial(run_task, task) for task in p.tasks])
    return out, lse, row_mass, row_sparsity, mask


def _blocks(mask: Tensor, layout: torch.Size, s: Strip) -> Tensor:
    """The strip's part of a block mask [B, Hq, query blocks, key blocks]: [batches, heads, group, key blocks]."""
    keys = slice(s.key0 // BLOCK, -(-s.key1 // BLOCK))
    return torch.unflatten(mask, 1, layout)[s.batches, s.heads, :, s.row0 // BLOCK, keys]


def _rows(x: Tensor, layout: torch.Size, s: Strip) -> Tensor:
    """The strip's rows of x [B, Hq, Lq, ...], as [batches, heads, group, rows, ...]."""
    return torch.unflatten(x, 1, layout)[s.batches, s.heads, :, s.row0 : s.row1]


def _visible_count(p: Problem, s: Strip) -> Tensor:
    """Number of keys at hand each row of the strip may attend to, [rows]: n_i without the evicted ones."""
    return p.token_count[s.row0 : s.row1] - p.position_offset


@blockwise.register_fake
def _(q, k, v, bias, tau, cu_seqlens, position_offset, scale, return_stats):  # type: ignore[no-untyped-def]  # noqa: ARG001
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    mass, sparsity = (q.new_empty(q.shape[:3] if return_stats else (0,), dtype=torch.float32) for _ in range(2))
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
    lse: Tensor,
    block_mask: Tensor,
    position_offset: int,
    scale: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias, dtau); an entry of `need` that is False leaves an empty tensor in its place.

    ds = p (dp - sum_j p dp) with dp = dO.V where the weight is positive: torch's softmax backward applied to dp,
    which is zero, and not computed, in empty blocks.
    """
    p = prepare(q, k, v, bias, tau, cu_seqlens, position_offset, scale, lse)
    need_q, need_k, need_v, need_bias, need_tau = need
    need_scores = need_q or need_k or need_bias
    layout, dtype, dim = p.q.shape[1:3], p.q.dtype, q.shape[3]
    grads = torch.unflatten(grad_out.to(dtype), 1, layout)
    dq = torch.zeros(q.shape if need_q else (0,), dtype=q.dtype)
    # Accumulated as [pairs, D, Lk]: this way round the product took 0.8 of the time.
    pairs_by_keys = (p.k.shape[0], dim, k.shape[2])
    dk = torch.zeros(pairs_by_keys if need_k else (0,), dtype=dtype)
    dv = torch.zeros(pairs_by_keys if need_v else (0,), dtype=dtype)
    dbias_parts = torch.zeros((len(p.tasks), *bias.shape) if need_bias else (0,), dtype=dtype)
    da_sums = torch.zeros(q.shape[:3] if need_tau else (0,), dtype=dtype)

    def run_task(index: int) -> None:
        task = p.tasks[index]
        spaces = scratch(p, task, 3)
        band_grad = torch.zeros(p.band[task[0].heads].shape if need_bias else (0,), dtype=dtype)
        for s in task:
            runs = active_runs(_blocks(block_mask, layout, s), s)
            if runs:  # else every weight is zero, and so are dp, D and ds
                run_strip(s, runs, spaces, band_grad)
        if need_bias:
            part = torch.unflatten(dbias_parts[index], 0, layout)[task[0].heads]
            part.copy_(torch.unflatten(band_gradient(band_grad.flatten(0, 1), bias.shape[1]), 0, part.shape[:2]))

    def run_strip(s: Strip, runs: list[tuple[int, int]], spaces: list[Tensor], band_grad: Tensor) -> None:
        pairs, width = slice(s.pair0, s.pair1), s.key1 - s.key0
        rows_q, rows_g = stacked_rows(s, p.q), stacked_rows(s, grads)
        probs = strip_probs(p, s, rows_q, spaces[0])
        thresholds = p.thresholds[s.heads, :, s.row0 : s.row1]
        whole_dp = carve(spaces[1], probs.shape)
        delta, da_sum = probs.new_zeros(2, *probs.shape[:2], 1)
        for run in runs:
            keys = slice(s.key0 + run[0], s.key0 + run[1])
            weights = strip_weights(p, s, probs, thresholds, run, spaces[2])
            if need_v:
                dv[pairs, :, keys].baddbmm_(rows_g.mT, weights)
            if not (need_scores or need_tau):
                continue
            dp = whole_dp[..., run[0] : run[1]]
            da = dp if dp.is_contiguous() else torch.empty_like(weights)
            torch.bmm(rows_g, p.v[pairs, keys].mT, out=da)
            torch.ops.aten.threshold_backward.grad_input(da, weights, 0, grad_input=dp)
            da_sum += dp.sum(-1, keepdim=True)
            if need_scores and runs != [(0, width)]:
                delta += dp.mul_(probs[..., run[0] : run[1]]).sum(-1, keepdim=True)
        if need_tau:
            _rows(da_sums, layout, s).copy_(view5(p, s, da_sum).squeeze(-1))
        if not need_scores:
            return
        if runs == [(0, width)]:
            ds = carve(spaces[2], probs.shape)
            torch.ops.aten._softmax_backward_data.out(whole_dp, probs, -1, dtype, grad_input=ds)
        else:  # the same, without a pass over dp where it is zero
            ds = probs.mul_(-delta)
            for start, stop in runs:
                ds[..., start:stop] += whole_dp[..., start:stop]
        if need_q:
            part = torch.bmm(ds, p.k[pairs, s.key0 : s.key1]).mul_(scale)
            _rows(dq, layout, s).copy_(view5(p, s, part))
        if need_k:
            dk[pairs, :, s.key0 : s.key1].baddbmm_(rows_q.mT, ds)
        if need_bias:
            covered, columns = band_columns(p, s)
            in_band = view5(p, s, ds)[..., -covered:]
            band_grad[..., : s.row1 - s.row0, columns].add_(in_band[0] if in_band.shape[0] == 1 else in_band.sum(0))

    # The longest tasks first, so that no core is left alone with one at the end.
    work = [sum(int(_blocks(block_mask, layout, s).sum()) for s in task) for task in p.tasks]
    order = sorted(range(len(work)), key=lambda index: -work[index])
    run_side_by_side([functools.partial(run_task, index) for index in order])
    dbias = dbias_parts.sum(0) if need_bias else dbias_parts
    dtau = (da_sums / p.token_count).sum((0, 2)) if need_tau else da_sums
    if need_k:  # the q of the strips carried log2(e)
        dk = dk.mT.div_(LOG2_E).reshape(k.shape)
    if need_v:
        dv = dv.mT.reshape(v.shape)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias.to(bias.dtype), dtau.to(tau.dtype)


@blockwise_backward.register_fake
def _(grad_out, q, k, v, bias, tau, cu_seqlens, lse, block_mask, position_offset, scale, need):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return tuple(x.new_empty(x.shape if wanted else (0,)) for x, wanted in zip((q, k, v, bias, tau), need, strict=True))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, bias, tau, cu_seqlens, position_offset, scale, _ = inputs
    ctx.save_for_backward(q, k, v, bias, tau, cu_seqlens, output[1], output[4])
    ctx.position_offset, ctx.scale = position_offset, scale
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_out, *_):  # type: ignore[no-untyped-def]
    need = [bool(flag) for flag in ctx.needs_input_grad[:5]]
    grads = blockwise_backward(grad_out, *ctx.saved_tensors, ctx.position_offset, ctx.scale, need)
    return (*(g if wanted else None for g, wanted in zip(grads, need, strict=True)), None, None, None, None)


blockwise.register_autograd(_backward, setup_context=_save)
