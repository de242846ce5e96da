"""Lazy Attention on a CPU: one strip of query rows at a time, in O(L x block) memory, with a fused backward.

A strip is BLOCK query rows of a few heads against every key they may see. Whole rows need no running maximum, let
torch's fused softmax backward make ds in one pass over memory, and leave 2 + 5 matrix products, as many as
FlashAttention. Key blocks that Elastic-Softmax empties are found from row maxima; the V product of the forward and the
dV and dO.V products of the backward skip them. The backward keeps nothing but the inputs, the lse and the block mask.
Heads are tasks, side by side on one core each (lanes.py), and the strips of a task run in a fixed order: results
repeat bitwise for a given thread count.
"""

import functools

import torch
from torch import Tensor

from lazypipe.kernels.cpu.lanes import run_side_by_side
from lazypipe.kernels.cpu.strips import (
    BLOCK,
    Problem,
    Strip,
    Task,
    TaskViews,
    active_runs,
    band_columns,
    band_gradient,
    block_peaks,
    carve,
    prepare,
    scratch,
    stacked_strips,
    strip_probs,
    strip_scores,
    strip_weights,
    task_views,
    view5,
)
from lazypipe.kernels.reference import LOG2_E


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

    def run_task(task: Task) -> None:
        t, spaces = task_views(p, task), scratch(p, task, 2)
        part_mask = _by_head(mask, layout, task)
        # Written at once where possible: [batches, heads, group, rows] of all strips.
        out_parts = torch.split(_part(out, layout, task), BLOCK, 3)
        totals, maxima = [], []
        for index, s in enumerate(task.strips):
            result, total, row_max = run_strip(task, t, index, s, spaces, part_mask)
            out_parts[index].copy_(result.div_(total).view(out_parts[index].shape))
            totals.append(total.view(*t.by_head, -1))
            maxima.append(row_max.view(*t.by_head, -1))
        _part(lse, layout, task).copy_(torch.cat(totals, -1).log2_().add_(torch.cat(maxima, -1)))

    def run_strip(
        task: Task, t: TaskViews, index: int, s: Strip, spaces: list[Tensor], part_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = strip_scores(p, t, index, s, spaces[0])
        peaks = block_peaks(scores) if look else scores.amax(-1, keepdim=True)
        row_max = peaks.amax(-1, keepdim=True) if look else peaks
        probs = scores.sub_(row_max).exp2_()  # times `total`, as are the weights: only the output is divided
        total = probs.sum(-1, keepdim=True)
        thresholds = t.thresholds[index] * total
        block_row, blocks = s.row0 // BLOCK, slice(s.key0 // BLOCK, -(-s.key1 // BLOCK))
        if look:
            # exp2 may differ in its last bit between the peaks and the strip: 1e-6 more never drops an active pair.
            highest = peaks.sub_(row_max).exp2_().mul_(1.0 + 1e-6).add_(thresholds)
            active = (highest > 0).view(part_mask.shape[0], -1, peaks.shape[-1]).any(1)
            part_mask[:, block_row, blocks] = active
            runs = active_runs(active.tolist(), s)
        else:
            part_mask[:, block_row, blocks] = True
            runs = [(0, s.key1 - s.key0)]
        result = scores.new_zeros(*scores.shape[:2], q.shape[3])
        mass, used = (torch.zeros_like(total) for _ in range(2)) if return_stats else (total, total)
        for start, stop in runs:
            weights = strip_weights(p, t, s, probs, thresholds, (start, stop), spaces[1])
            result.baddbmm_(weights, t.values[:, s.key0 + start : s.key0 + stop])
            if return_stats:
                mass += weights.sum(-1, keepdim=True)
                used += (weights > 0).sum(-1, keepdim=True)
        if return_stats:
            rows = slice(s.row0, s.row1)
            _part(row_mass, layout, task)[..., rows] = view5(t, s, mass / total).squeeze(-1)
            share = view5(t, s, used).squeeze(-1) / _visible_count(p, s)
            _part(row_sparsity, layout, task)[..., rows] = 1.0 - share
        return result, total, row_max

    run_side_by_side([functools.partial(run_task, task) for task in p.tasks])
    return out, lse, row_mass, row_sparsity, mask


def _part(x: Tensor, layout: torch.Size, task: Task) -> Tensor:
    """The task's share of x [B, Hq, Lq, ...], as [batches, heads, group, Lq, ...]."""
    return torch.unflatten(x, 1, layout)[task.batches, task.heads]


def _by_head(mask: Tensor, layout: torch.Size, task: Task) -> Tensor:
    """The task's share of a mask [B, Hq, query blocks, key blocks], as [pairs * group, query blocks, key blocks]."""
    return _part(mask, layout, task).view(-1, *mask.shape[2:])


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
        t, spaces = task_views(p, task), scratch(p, task, 3)
        rows_g = stacked_strips(grads[task.batches, task.heads])
        dq_parts = torch.split(_part(dq, layout, task), BLOCK, 3) if need_q else ()
        da_parts = torch.split(_part(da_sums, layout, task), BLOCK, 3) if need_tau else ()
        band_grad = torch.zeros(t.band.shape if need_bias else (0,), dtype=dtype)
        by_query_block = _by_head(block_mask, layout, task).transpose(0, 1).tolist()
        for number, (s, active) in enumerate(zip(task.strips, by_query_block, strict=True)):
            blocks = slice(s.key0 // BLOCK, -(-s.key1 // BLOCK))
            runs = active_runs([flags[blocks] for flags in active], s)
            if not runs:
                continue  # every weight is zero, and so are dp, D and ds
            ds, da_sum = score_gradients(task, t, number, s, runs, rows_g[number], spaces)
            if need_tau:
                da_parts[number].copy_(da_sum.view(da_parts[number].shape))
            if need_q:
                part = torch.bmm(ds, t.keys[:, s.key0 : s.key1]).mul_(scale)
                dq_parts[number].copy_(part.view(dq_parts[number].shape))
            if need_k:
                dk[task.pair0 : task.pair1, :, s.key0 : s.key1].baddbmm_(t.rows_q[number].mT, ds)
            if need_bias:
                covered, columns = band_columns(p, s)
                in_band = view5(t, s, ds)[..., -covered:]
                in_band = in_band[0] if in_band.shape[0] == 1 else in_band.sum(0)
                band_grad[..., : s.row1 - s.row0, columns].add_(in_band)
        if need_bias:
            total = torch.unflatten(dbias_parts[index], 0, layout)[task.heads]
            total.copy_(torch.unflatten(band_gradient(band_grad.flatten(0, 1), bias.shape[1]), 0, total.shape[:2]))

    def score_gradients(
        task: Task, t: TaskViews, number: int, s: Strip, runs: list[tuple[int, int]], rows_g: Tensor,
        spaces: list[Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(ds [pairs, group * rows, keys], sum_j da [pairs, group * rows, 1]) of a strip; adds its part of dv."""
        pairs, whole = slice(task.pair0, task.pair1), [(0, s.key1 - s.key0)]
        probs = strip_probs(p, t, number, s, spaces[0])
        whole_dp = carve(spaces[1], (probs.shape[0], probs.shape[1], probs.shape[2]))
        delta, da_sum = probs.new_zeros(2, *probs.shape[:2], 1)
        for start, stop in runs:
            keys = slice(s.key0 + start, s.key0 + stop)
            weights = strip_weights(p, t, s, probs, t.thresholds[number], (start, stop), spaces[2])
            if need_v:
                dv[pairs, :, keys].baddbmm_(rows_g.mT, weights)
            if not (need_scores or need_tau):
                continue
            dp = whole_dp[..., start:stop]
            da = dp if runs == whole else torch.empty_like(weights)
            torch.bmm(rows_g, t.values_t[:, :, keys], out=da)
            torch.ops.aten.threshold_backward.grad_input(da, weights, 0, grad_input=dp)
            if need_tau:
                da_sum += dp.sum(-1, keepdim=True)
            if need_scores and runs != whole:
                delta += dp.mul_(probs[..., start:stop]).sum(-1, keepdim=True)
        if not need_scores:
            return probs, da_sum
        if runs == whole:
            ds = carve(spaces[2], (probs.shape[0], probs.shape[1], probs.shape[2]))
            torch.ops.aten._softmax_backward_data.out(whole_dp, probs, -1, dtype, grad_input=ds)
            return ds, da_sum
        ds = probs.mul_(delta.neg_())  # the same, without a pass over dp where it is zero
        for start, stop in runs:
            ds[..., start:stop] += whole_dp[..., start:stop]
        return ds, da_sum

    # The longest tasks first, so that no core is left alone with one at the end.
    work = [int(_by_head(block_mask, layout, task).sum()) for task in p.tasks]
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
    dq, dk, dv, dbias, dtau = (
        x.new_empty(x.shape if wanted else (0,)) for x, wanted in zip((q, k.mT, v.mT, bias, tau), need, strict=True)
    )
    # dk and dv are accumulated the other way round, and compiled code relies on strides.
    return dq, dk.mT if need[1] else dk, dv.mT if need[2] else dv, dbias, dtau


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
