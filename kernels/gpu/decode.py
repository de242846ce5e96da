"""A few queries against a long key cache, inference only: keys are split over programs, V rows are read only when used.

`decode_scores_kernel` reads K once, writes the scores (4 bytes a key and head, small beside K's 2 D) and each split's
maximum and sum. `decode_values_kernel` merges those into the log-sum-exp, thresholds the stored scores, and loads a row
of V only where some query of the group gives it a positive weight. Query heads that share a key head, and all queries
of a chunk, are stacked into the rows of one product. Partial outputs are added afterwards, in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lazypipe.kernels.gpu.blocks import product
from lazypipe.kernels.gpu.launch import on_device, options, precision, require_layout, rows_contiguous
from lazypipe.kernels.gpu.tiles import decode_tile, padded_dim
from lazypipe.kernels.reference import LOG2_E

DECODE_PROGRAMS = 264  # two for each multiprocessor of an H100; more only adds partial outputs to merge
MOST_SPLITS = 64


@triton.jit
def decode_scores_kernel(
    p_q, p_k, p_bias, p_scores, p_max, p_sum,
    s_qb, s_qh, s_ql, s_kb, s_kh, s_kl,
    heads_kv, group, query_len, key_len, window, keys_per_split, qk_scale,
    D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p_scores [B, Hkv, rows, Lk] in log2 units, p_max and p_sum [B, Hkv, splits, rows]; row = head of group, query."""
    i_split, i_bkv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_kv = i_bkv // heads_kv, i_bkv % heads_kv
    rows = group * query_len
    o_r, o_d = tl.arange(0, BR), tl.arange(0, DP)
    m_r, m_d = o_r < rows, o_d < D
    i_h, i_q = i_kv * group + o_r // query_len, o_r % query_len
    o_pos = i_q + key_len - query_len
    o_q = i_b * s_qb + i_h.to(tl.int64) * s_qh + i_q.to(tl.int64) * s_ql
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)  # [BR, DP]
    p_k += i_b * s_kb + i_kv * s_kh
    p_scores += i_bkv * rows * key_len
    b_max = tl.full([BR], -1e30, dtype=tl.float32)
    b_sum = tl.zeros([BR], dtype=tl.float32)
    start = i_split * keys_per_split
    for key0 in range(start, tl.minimum(start + keys_per_split, key_len), BN):
        o_key = key0 + tl.arange(0, BN)
        m_key = o_key < key_len
        o_k = o_key[:, None].to(tl.int64) * s_kl + o_d[None, :]
        b_k = tl.load(p_k + o_k, mask=m_key[:, None] & m_d[None, :], other=0.0)  # [BN, DP]
        o_dist = o_pos[:, None] - o_key[None, :]
        m_bias = (o_dist >= 0) & (o_dist < window) & m_r[:, None]
        b_bias = tl.load(p_bias + i_h[:, None] * window + o_dist, mask=m_bias, other=0.0)
        b_s = product(b_q, tl.trans(b_k), PRECISION=PRECISION) * qk_scale + b_bias * 1.4426950408889634
        b_s = tl.where((o_dist >= 0) & m_key[None, :], b_s, float("-inf"))
        o_s = o_r[:, None].to(tl.int64) * key_len + o_key[None, :]
        tl.store(p_scores + o_s, b_s, mask=m_r[:, None] & m_key[None, :])
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
        b_max = b_new
    o_part = (i_bkv * tl.num_programs(0) + i_split) * rows + o_r
    tl.store(p_max + o_part, b_max, mask=m_r)
    tl.store(p_sum + o_part, b_sum, mask=m_r)


@triton.jit
def decode_values_kernel(
    p_v, p_scores, p_max, p_sum, p_tau, p_out, p_read,
    s_vb, s_vh, s_vl,
    heads_kv, group, query_len, key_len, offset, keys_per_split,
    D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """p_out [B, Hkv, splits, rows, D] float32, p_read [B, Hkv, splits] int32: rows of V that were loaded."""
    i_split, i_bkv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_splits = tl.num_programs(0)
    i_b, i_kv = i_bkv // heads_kv, i_bkv % heads_kv
    rows = group * query_len
    o_r, o_d, o_p = tl.arange(0, BR), tl.arange(0, DP), tl.arange(0, SPLITS)
    m_r, m_d = o_r < rows, o_d < D
    i_h, i_q = i_kv * group + o_r // query_len, o_r % query_len
    o_pos = i_q + key_len - query_len
    o_part = (i_bkv * num_splits + o_p)[:, None] * rows + o_r[None, :]
    m_part = (o_p < num_splits)[:, None] & m_r[None, :]
    b_maxes = tl.load(p_max + o_part, mask=m_part, other=-1e30)  # [SPLITS, BR]
    b_sums = tl.load(p_sum + o_part, mask=m_part, other=0.0)
    b_max = tl.max(b_maxes, 0)
    b_lse = b_max + tl.log2(tl.maximum(tl.sum(b_sums * tl.exp2(b_maxes - b_max[None, :]), 0), 1e-30))
    b_count = (o_pos + offset + 1).to(tl.float32)
    b_tau = tl.load(p_tau + i_h, mask=m_r, other=0.0)

    p_v += i_b * s_vb + i_kv * s_vh
    p_scores += i_bkv * rows * key_len
    b_out = tl.zeros([BR, DP], dtype=tl.float32)
    read = tl.zeros([BN], dtype=tl.int32)
    start = i_split * keys_per_split
    for key0 in range(start, tl.minimum(start + keys_per_split, key_len), BN):
        o_key = key0 + tl.arange(0, BN)
        m_key = o_key < key_len
        o_s = o_r[:, None].to(tl.int64) * key_len + o_key[None, :]
        b_s = tl.load(p_scores + o_s, mask=m_r[:, None] & m_key[None, :], other=float("-inf"))
        m_see = (o_key[None, :] <= o_pos[:, None]) & m_key[None, :] & m_r[:, None]
        b_a = tl.maximum(tl.exp2(b_s - b_lse[:, None]) + (b_tau / b_count)[:, None], 0.0)
        b_a = tl.where((b_count == 1.0)[:, None], tl.maximum(1.0 + b_tau, 0.0)[:, None], b_a)
        b_a = tl.where(m_see, b_a, 0.0)
        m_used = tl.max(b_a, 0) > 0.0  # [BN]
        read += tl.where(m_used, 1, 0)
        o_v = o_key[:, None].to(tl.int64) * s_vl + o_d[None, :]
        b_v = tl.load(p_v + o_v, mask=m_used[:, None] & m_d[None, :], other=0.0)  # [BN, DP]
        b_out = product(b_a.to(b_v.dtype), b_v, b_out, PRECISION=PRECISION)
    i_out = i_bkv * num_splits + i_split
    o_out = (i_out * rows + o_r)[:, None] * D + o_d[None, :]
    tl.store(p_out + o_out, b_out, mask=m_r[:, None] & m_d[None, :])
    tl.store(p_read + i_out, tl.sum(read, 0))


def launch_decode(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tau: Tensor, offset: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Lq, D], rows of V read [B, Hkv] int64); Hq / Hkv * Lq is at most tiles.DECODE_ROWS."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, heads, query_len, dim = q.shape
    heads_kv, key_len = k.shape[1:3]
    group = heads // heads_kv
    rows = group * query_len
    tile = decode_tile(padded_dim(dim), q.dtype == torch.float32)
    wanted = min(MOST_SPLITS, max(1, DECODE_PROGRAMS // (batch * heads_kv)), math.ceil(key_len / tile.block_n))
    keys_per_split = math.ceil(key_len / wanted / tile.block_n) * tile.block_n
    splits = math.ceil(key_len / keys_per_split)
    scores = torch.empty(batch, heads_kv, rows, key_len, dtype=torch.float32, device=q.device)
    peaks, sums = (torch.empty(batch, heads_kv, splits, rows, dtype=torch.float32, device=q.device) for _ in range(2))
    parts = torch.empty(batch, heads_kv, splits, rows, dim, dtype=torch.float32, device=q.device)
    read = torch.empty(batch, heads_kv, splits, dtype=torch.int32, device=q.device)
    sizes = {"D": dim, "DP": padded_dim(dim), "BR": max(16, triton.next_power_of_2(rows)), "BN": tile.block_n}
    table = require_layout("bias", bias.contiguous(), (heads, bias.shape[1]))
    taus = require_layout("tau", tau.contiguous(), (heads,))
    with on_device(q):
        decode_scores_kernel[(splits, batch * heads_kv)](
            q, k, table, scores, peaks, sums, *q.stride()[:3], *k.stride()[:3],
            heads_kv, group, query_len, key_len, bias.shape[1], keys_per_split, scale * LOG2_E,
            **sizes, PRECISION=precision("scores", q), **options(tile),
        )  # fmt: skip
        decode_values_kernel[(splits, batch * heads_kv)](
            v, scores, peaks, sums, taus, parts, read, *v.stride()[:3],
            heads_kv, group, query_len, key_len, offset, keys_per_split,
            **sizes, SPLITS=triton.next_power_of_2(splits), PRECISION=precision("values", q),
            **options(tile),
        )  # fmt: skip
    return parts.sum(2).view(q.shape).to(q.dtype), read.sum(2)
