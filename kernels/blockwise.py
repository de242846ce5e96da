"""Lazy Attention on a CPU: one strip of query rows at a time, in O(L x block) memory, with a fused backward.

A strip is BLOCK query rows of a few heads against every key they may see. Holding whole rows lets torch's fused
softmax and softmax-backward do in one pass over memory what tiles would do in several, and leaves 2 + 5 matrix
products, as many as FlashAttention. Key blocks that Elastic-Softmax empties are found from row maxima right after the
softmax; the V product of the forward and the dV and dO.V products of the backward skip them. The backward keeps
nothing but the inputs and the block mask.

The distance bias depends on i - j only, so one [BLOCK, W + BLOCK - 1] band per head, causal mask included, serves every
strip. Query heads that share a key head are stacked as extra rows of the same strip, so keys are never repeated and
dK, dV need no reduction over the group.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import document_starts

BLOCK = 128
# Elements of one strip of scores. 1M float32 elements (4 MB) stay in cache; larger strips were slower at L = 8192,
# smaller ones pay more for the calls than for the arithmetic at L = 256.
STRIP_ELEMENTS = 1 << 20


class Strip(NamedTuple):
    """One unit of work: query rows [row0, row1) of some batches and key heads against keys [key0, key1)."""

    batches: slice
    heads: slice
    row0: int
    row1: int
    key0: int
    key1: int


class Problem(NamedTuple):
    """The inputs in the layout and dtype the strips work in."""

    q: Tensor  # [B, Hkv, group, Lq, D], scaled
    k: Tensor  # [B, Hkv, Lk, D]
    v: Tensor  # [B, Hkv, Lk, D]
    tau: Tensor  # [Hkv, group]
    band: Tensor  # [Hkv, group, BLOCK, W + BLOCK - 1]: bias, 0 beyond the window, -inf above the diagonal
    first_key: Tensor | None  # [Lq] int64, None without packed documents
    first_key_list: list[int] | None
    position_offset: int
    any_positive_tau: bool

    @property
    def shift(self) -> int:
        """Position of query 0 among the keys at hand."""
        return self.k.shape[2] - self.q.shape[3]


def _band(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """band[h, m, c] = bias[h, W - 1 + m - c], the scores' additive term for the last W + BLOCK - 1 keys of a strip."""
    heads, window = bias.shape
    beyond = bias.new_zeros(heads, BLOCK - 1)
    future = bias.new_full((heads, BLOCK - 1), -torch.inf)
    descending = torch.cat([beyond, bias.flip(-1), future], dim=-1).to(dtype)
    length = descending.shape[-1]
    rows_reversed = descending.as_strided((heads, BLOCK, window + BLOCK - 1), (length, 1, 1))
    return rows_reversed.flip(1)


def _band_gradient(band_grad: Tensor, window: int) -> Tensor:
    """Sums each diagonal of a band gradient [H, BLOCK, W + BLOCK - 1] into dbias [H, W]."""
    heads, rows, columns = band_grad.shape
    diagonals = band_grad.contiguous().as_strided((heads, window, rows), (rows * columns, 1, columns + 1))
    return diagonals.sum(-1).flip(-1)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tau: Tensor, cu_seqlens: Tensor | None, offset: int, scale: float
) -> Problem:
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads_kv, query_len = k.shape[1], q.shape[2]
    first_key = None if cu_seqlens is None else document_starts(cu_seqlens, query_len)
    return Problem(
        q=torch.unflatten(q.to(compute) * scale, 1, (heads_kv, -1)),
        k=k.to(compute).contiguous(),
        v=v.to(compute).contiguous(),
        tau=torch.unflatten(tau.to(compute), 0, (heads_kv, -1)),
        band=torch.unflatten(_band(bias, compute), 0, (heads_kv, -1)),
        first_key=first_key,
        first_key_list=None if first_key is None else first_key.tolist(),
        position_offset=offset,
        any_positive_tau=bool((tau > 0).any()),
    )


def _strips(p: Problem) -> Iterator[Strip]:
    """Strips of at most about STRIP_ELEMENTS scores: several whole batches, or some key heads of one batch."""
    batch, heads_kv, group, query_len, _ = p.q.shape
    for row0 in range(0, query_len, BLOCK):
        row1 = min(row0 + BLOCK, query_len)
        key0 = 0 if p.first_key_list is None else p.first_key_list[row0] // BLOCK * BLOCK
        key1 = p.shift + row1
        pairs = max(1, STRIP_ELEMENTS // (group * (row1 - row0) * (key1 - key0)))
        batch_step, head_step = max(1, pairs // heads_kv), min(pairs, heads_kv)
        for b in range(0, batch, batch_step):
            for h in range(0, heads_kv, head_step):
                batches, heads = slice(b, min(b + batch_step, batch)), slice(h, min(h + head_step, heads_kv))
                yield Strip(batches, heads, row0, row1, key0, key1)


def _hidden(p: Problem, s: Strip) -> Tensor | None:
    """Keys of earlier documents, True where hidden, [rows, columns]. None when there are none."""
    if p.first_key is None or p.first_key_list is None or p.first_key_list[s.row1 - 1] == s.key0:
        return None
    columns = torch.arange(s.key0, p.first_key_list[s.row1 - 1])
    return columns[None, :] < p.first_key[s.row0 : s.row1, None]


def _scores(p: Problem, s: Strip, rows_q: Tensor) -> Tensor:
    """Biased and masked scores [b, h, group, rows, keys] of a strip."""
    batches, heads, group, rows, dim = rows_q.shape
    keys = p.k[s.batches, s.heads, s.key0 : s.key1]
    scores = torch.matmul(rows_q.reshape(batches, heads, group * rows, dim), keys.transpose(-1, -2))
    scores = scores.view(batches, heads, group, rows, -1)
    width = p.band.shape[-1] - (BLOCK - rows)
    take = min(width, s.key1 - s.key0)
    scores[..., -take:] += p.band[s.heads, :, :rows, width - take : width]
    hidden = _hidden(p, s)
    if hidden is not None:
        scores[..., : hidden.shape[-1]].masked_fill_(hidden, -torch.inf)
    return scores


def _thresholds(p: Problem, s: Strip) -> tuple[Tensor, Tensor]:
    """(tau_h / n_i [h, group, rows, 1], n_i [rows, 1]) of a strip."""
    counts = torch.arange(s.row0 + p.shift + p.position_offset + 1, s.row1 + p.shift + p.position_offset + 1)
    if p.first_key is not None:
        counts = counts - p.first_key[s.row0 : s.row1]
    token_count = counts.to(p.q.dtype)[:, None]
    return p.tau[s.heads, :, None, None] / token_count, token_count


def _active_blocks(probs: Tensor, thresholds: Tensor) -> Tensor:
    """[b, h, group, key blocks] bool: some p + tau / n of the block is positive. Exact: addition is monotone."""
    whole = probs.shape[-1] // BLOCK * BLOCK
    peaks = torch.unflatten(probs[..., :whole], -1, (-1, BLOCK)).amax(-1)
    if whole < probs.shape[-1]:
        peaks = torch.cat([peaks, probs[..., whole:].amax(-1, keepdim=True)], dim=-1)
    return (peaks + thresholds > 0).any(-2)


def _runs(active: Tensor, s: Strip) -> list[tuple[int, int]]:
    """Maximal column ranges of the strip whose blocks are active for any of its heads."""
    flags = active.flatten(0, -2).any(0).tolist()
    width = s.key1 - s.key0
    runs: list[tuple[int, int]] = []
    for block, flag in enumerate(flags):
        if not flag:
            continue
        start, stop = block * BLOCK, min((block + 1) * BLOCK, width)
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


def _clear_hidden(p: Problem, s: Strip, weights: Tensor, first_column: int) -> None:
    """With tau > 0 masked positions come out of the threshold positive: put them back to zero."""
    columns = torch.arange(s.key0 + first_column, s.key0 + first_column + weights.shape[-1])
    query_at = torch.arange(s.row0, s.row1)[:, None] + p.shift
    hidden = columns > query_at
    if p.first_key is not None:
        hidden = hidden | (columns < p.first_key[s.row0 : s.row1, None])
    weights.masked_fill_(hidden, 0.0)


def _weights(p: Problem, s: Strip, probs: Tensor, thresholds: Tensor, run: tuple[int, int]) -> Tensor:
    """a = max(p + tau / n, 0) of the columns of one run, [b, h, group, rows, run]."""
    weights = torch.add(probs[..., run[0] : run[1]], thresholds).relu_()
    if p.any_positive_tau:
        _clear_hidden(p, s, weights, run[0])
    return weights


def _stack(x: Tensor) -> Tensor:
    """[b, h, group, rows, n] -> [b, h, group * rows, n]."""
    return x.flatten(2, 3)


def _key_blocks(p: Problem) -> int:
    return -(-p.k.shape[2] // BLOCK)


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
    p = _prepare(q, k, v, bias, tau, cu_seqlens, position_offset, scale)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows_of_out = torch.unflatten(out, 1, p.tau.shape)
    mask = torch.zeros(*q.shape[:2], -(-q.shape[2] // BLOCK), _key_blocks(p), dtype=torch.bool)
    rows_of_mask = torch.unflatten(mask, 1, p.tau.shape)
    stat_shape = q.shape[:3] if return_stats else (0,)
    lse, mass, sparsity = (torch.empty(stat_shape, dtype=torch.float32) for _ in range(3))
    # Looking for empty blocks costs a pass over the strip; two or three blocks cannot repay it.
    look = return_stats or (p.k.shape[2] > 3 * BLOCK and bool((tau < 0).any()))

    for s in _strips(p):
        scores = _scores(p, s, p.q[s.batches, s.heads, :, s.row0 : s.row1])
        probs = torch.softmax(scores, dim=-1)
        thresholds, token_count = _thresholds(p, s)
        here = rows_of_mask[s.batches, s.heads, :, s.row0 // BLOCK, s.key0 // BLOCK : -(-s.key1 // BLOCK)]
        runs = [(0, s.key1 - s.key0)]
        here.fill_(True)
        if look:
            here.copy_(_active_blocks(probs, thresholds))
            runs = _runs(here, s)
        values = p.v[s.batches, s.heads, s.key0 : s.key1]
        result, row_mass, row_used = None, torch.zeros(()), torch.zeros(())
        for run in runs:
            weights = _weights(p, s, probs, thresholds, run)
            part = torch.matmul(_stack(weights), values[:, :, run[0] : run[1]])
            result = part if result is None else result.add_(part)
            if return_stats:
                row_mass = row_mass + weights.sum(-1)
                row_used = row_used + (weights > 0).sum(-1)
        target = rows_of_out[s.batches, s.heads, :, s.row0 : s.row1]
        if result is None:
            target.zero_()
        else:
            target.copy_(result.view(target.shape))
        if return_stats:
            at = (s.batches, s.heads, slice(None), slice(s.row0, s.row1))
            torch.unflatten(lse, 1, p.tau.shape)[at] = torch.logsumexp(scores, dim=-1).to(torch.float32)
            torch.unflatten(mass, 1, p.tau.shape)[at] = row_mass.to(torch.float32)
            visible = token_count[:, 0] - p.position_offset
            torch.unflatten(sparsity, 1, p.tau.shape)[at] = (1.0 - row_used / visible).to(torch.float32)
    return out, lse, mass, sparsity, mask


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
    p = _prepare(q, k, v, bias, tau, cu_seqlens, position_offset, scale)
    need_q, need_k, need_v, need_bias, need_tau = need
    need_scores = need_q or need_k or need_bias
    dtype = p.q.dtype
    grads = torch.unflatten(grad_out, 1, p.tau.shape)
    mask = torch.unflatten(block_mask, 1, p.tau.shape)
    dq = torch.empty(q.shape if need_q else (0,), dtype=q.dtype)
    dk = torch.zeros(k.shape if need_k else (0,), dtype=dtype)
    dv = torch.zeros(v.shape if need_v else (0,), dtype=dtype)
    band_grad = torch.zeros(p.band.shape if need_bias else (0,), dtype=dtype)
    dtau = torch.zeros(p.tau.shape if need_tau else (0,), dtype=dtype)

    for s in _strips(p):
        rows_q = p.q[s.batches, s.heads, :, s.row0 : s.row1]
        rows_g = _stack(grads[s.batches, s.heads, :, s.row0 : s.row1].to(dtype))
        probs = torch.softmax(_scores(p, s, rows_q), dim=-1)
        thresholds, token_count = _thresholds(p, s)
        width = s.key1 - s.key0
        runs = _runs(mask[s.batches, s.heads, :, s.row0 // BLOCK, s.key0 // BLOCK : -(-s.key1 // BLOCK)], s)
        dp = None
        if runs != [(0, width)]:
            dp = torch.zeros_like(probs)
        for run in runs:
            keys = slice(s.key0 + run[0], s.key0 + run[1])
            weights = _weights(p, s, probs, thresholds, run)
            if need_v:
                dv[s.batches, s.heads, keys] += torch.matmul(_stack(weights).transpose(-1, -2), rows_g)
            if need_scores or need_tau:
                da = torch.matmul(rows_g, p.v[s.batches, s.heads, keys].transpose(-1, -2)).view_as(weights)
                da = torch.ops.aten.threshold_backward(da, weights, 0)
                if need_tau:
                    dtau[s.heads] += (da.sum(-1, keepdim=True) / token_count).sum((0, 3, 4))
                if dp is None:
                    dp = da
                else:
                    dp[..., run[0] : run[1]] = da
        if not need_scores or not runs:  # a strip whose weights are all zero has dp = 0, hence ds = 0
            if need_q:
                torch.unflatten(dq, 1, p.tau.shape)[s.batches, s.heads, :, s.row0 : s.row1] = 0
            continue
        ds = torch.ops.aten._softmax_backward_data(dp, probs, -1, dtype)
        if need_q:
            part = torch.matmul(_stack(ds), p.k[s.batches, s.heads, s.key0 : s.key1]).mul_(scale)
            torch.unflatten(dq, 1, p.tau.shape)[s.batches, s.heads, :, s.row0 : s.row1] = part.view(rows_q.shape)
        if need_k:
            dk[s.batches, s.heads, s.key0 : s.key1] += torch.matmul(_stack(ds).transpose(-1, -2), _stack(rows_q))
        if need_bias:
            columns = band_grad.shape[-1] - (BLOCK - (s.row1 - s.row0))
            take = min(columns, width)
            band_grad[s.heads, :, : s.row1 - s.row0, columns - take : columns] += ds[..., -take:].sum(0)
    dbias = _band_gradient(band_grad.flatten(0, 1), bias.shape[1]) if need_bias else band_grad
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias.to(bias.dtype), dtau.flatten().to(tau.dtype)


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
