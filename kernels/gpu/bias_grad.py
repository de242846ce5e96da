"""The gradient of the distance bias, outside the hot loops and without atomics.

One program per (block difference, slice of the query blocks, head) recomputes ds of its blocks, all of which share one
tile of the bias, sums them in registers and writes one [T, T] tile. Only blocks that meet the window are visited:
about half a matrix product per causal block at L = 4096, W = 512. `toeplitz.bias_gradient` sums the diagonals.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
import triton
import triton.language as tl

from lazypipe.kernels.gpu.blocks import block_is_active, product, row_tokens


@triton.jit
def bias_kernel(
    p_q, p_k, p_v, p_do, p_bias, p_tau, p_first, p_lse, p_delta, p_words, p_tiles,
    s_qb, s_qh, s_ql, s_kb, s_kh, s_kl, s_vb, s_vh, s_vl, s_gb, s_gh, s_gl,
    batch, heads_q, group, query_len, key_len, offset, window, num_words, num_mask_rows, first_delta, qk_scale,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, MM: tl.constexpr, MN: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p_tiles [Hq, differences, slices, T, T] float32: sum of ds over the blocks of one difference and slice."""
    i_t, i_slice, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_slices = tl.num_programs(1)
    shift = key_len - query_len
    delta = first_delta + i_t * T  # distance from a block's first key to its first query
    o_t, o_d = tl.arange(0, T), tl.arange(0, DP)
    m_d = o_d < D
    o_dist = delta + o_t[:, None] - o_t[None, :]
    b_bias = tl.load(p_bias + i_h * window + o_dist, mask=(o_dist >= 0) & (o_dist < window), other=0.0)
    b_bias = b_bias * 1.4426950408889634
    tau = tl.load(p_tau + i_h)
    i_kv = i_h // group

    num_rows = tl.cdiv(query_len, T)
    total = batch * num_rows
    per_slice = tl.cdiv(total, num_slices)
    b_sum = tl.zeros([T, T], dtype=tl.float32)
    for i_item in range(i_slice * per_slice, tl.minimum((i_slice + 1) * per_slice, total)):
        i_b, i_m = (i_item // num_rows).to(tl.int64), i_item % num_rows
        row0 = i_m * T
        key0 = row0 + shift - delta  # a multiple of T by the choice of first_delta
        first_min = 0
        if PACKED:
            first_min = tl.load(p_first + row0)
        if (key0 > first_min - T) & (key0 < key_len) & (key0 >= 0):
            i_bh = i_b * heads_q + i_h
            o_m, o_key = row0 + o_t, key0 + o_t
            m_row = o_m < query_len
            m_tile = m_row[:, None] & m_d[None, :]
            m_key = (o_key < key_len)[:, None] & m_d[None, :]
            o_long, o_key_long = o_m[:, None].to(tl.int64), o_key[:, None].to(tl.int64)
            b_q = tl.load(p_q + i_b * s_qb + i_h * s_qh + o_long * s_ql + o_d[None, :], mask=m_tile, other=0.0)
            b_k = tl.load(p_k + i_b * s_kb + i_kv * s_kh + o_key_long * s_kl + o_d[None, :], mask=m_key, other=0.0)
            b_lse = tl.load(p_lse + i_bh * query_len + o_m, mask=m_row, other=float("inf"))
            b_delta = tl.load(p_delta + i_bh * query_len + o_m, mask=m_row, other=0.0)
            o_first, b_count = row_tokens(o_m, query_len, shift, offset, p_first, PACKED)
            b_s = product(b_q, tl.trans(b_k), PRECISION=PRECISION) * qk_scale + b_bias
            m_see = (o_key[None, :] <= (o_m + shift)[:, None]) & (o_key[None, :] >= o_first[:, None]) & m_row[:, None]
            b_p = tl.where(m_see, tl.exp2(b_s - b_lse[:, None]), 0.0)
            b_ds = b_p * (0.0 - b_delta)[:, None]
            p_head_words = p_words + i_bh * num_mask_rows * num_words
            if block_is_active(p_head_words, i_m, key0 // T, num_words, T, T, MM, MN):
                b_do = tl.load(p_do + i_b * s_gb + i_h * s_gh + o_long * s_gl + o_d[None, :], mask=m_tile, other=0.0)
                b_v = tl.load(p_v + i_b * s_vb + i_kv * s_vh + o_key_long * s_vl + o_d[None, :], mask=m_key, other=0.0)
                b_da = product(b_do, tl.trans(b_v), PRECISION=PRECISION)
                b_ds += tl.where(m_see & (b_p + (tau / b_count)[:, None] > 0.0), b_p * b_da, 0.0)
            b_sum += tl.where((b_count == 1.0)[:, None], 0.0, b_ds)
    i_tile = ((i_h * tl.num_programs(0) + i_t) * num_slices + i_slice) * (T * T)
    tl.store(p_tiles + i_tile + o_t[:, None] * T + o_t[None, :], b_sum)
