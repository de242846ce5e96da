"""The Triton backward for q, k and v, without atomics: two kernels, each row or column of tiles owned by one program.

    m_ij = 1[a_ij > 0]    dp_ij = m_ij dO_i.v_j    D_i = sum_j p_ij dp_ij    ds_ij = p_ij (dp_ij - D_i)

`query_kernel` visits active blocks only: X_i = sum_j p_ij dp_ij k_j and D_i come from those, and dq_i = scale (X_i -
D_i M_i) with M_i = sum_j p_ij k_j saved by the forward. It also sums dp over j, which is all dtau needs. `key_kernel`
visits every block, since ds = -p D in empty ones, but computes dO.V and dV in active blocks only. Matrix products per
causal block: 3 rho and 2 + 2 rho.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
import triton
import triton.language as tl

from lazypipe.kernels.gpu.blocks import (
    HIDDEN,
    add_bias,
    add_bias_transposed,
    block_is_active,
    popcount,
    product,
    row_tokens,
    unsigned_word,
)


@triton.jit
def query_kernel(
    p_q, p_k, p_v, p_do, p_table, p_tau, p_first, p_lse, p_mean, p_words, p_dq, p_delta, p_da,
    s_qb, s_qh, s_ql, s_kb, s_kh, s_kl, s_vb, s_vh, s_vl, s_gb, s_gh, s_gl,
    heads_q, group, query_len, key_len, offset, window, num_tiles, num_words, num_mask_rows, qk_scale, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, MM: tl.constexpr,
    PACKED: tl.constexpr, NEED_DQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, Hq, Lq, D], D_i and sum_j dp_ij [B, Hq, Lq]. The mask was written for MM x BN blocks, BM divides MM."""
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // heads_q, i_bh % heads_q
    i_kv = i_h // group
    shift = key_len - query_len
    row0 = i_m * BM
    o_m, o_n, o_d = row0 + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP)
    m_row, m_d = o_m < query_len, o_d < D
    m_tile = m_row[:, None] & m_d[None, :]
    o_pos = o_m + shift
    o_first, b_count = row_tokens(o_m, query_len, shift, offset, p_first, PACKED)
    first_min, first_max = 0, 0
    if PACKED:
        first_min = tl.load(p_first + row0)
        first_max = tl.load(p_first + tl.minimum(row0 + BM, query_len) - 1)
    tau = tl.load(p_tau + i_h)
    b_tau = tau / b_count
    o_rows = i_bh * query_len + o_m
    b_lse = tl.load(p_lse + o_rows, mask=m_row, other=float("inf"))  # p = 0 there

    p_k += i_b * s_kb + i_kv * s_kh
    p_v += i_b * s_vb + i_kv * s_vh
    p_table += i_h * num_tiles * (BM * BN)
    p_words += (i_bh * num_mask_rows + row0 // MM) * num_words
    o_long = o_m[:, None].to(tl.int64)
    b_q = tl.load(p_q + i_b * s_qb + i_h * s_qh + o_long * s_ql + o_d[None, :], mask=m_tile, other=0.0)  # [BM, DP]
    b_do = tl.load(p_do + i_b * s_gb + i_h * s_gh + o_long * s_gl + o_d[None, :], mask=m_tile, other=0.0)  # [BM, DP]

    word_lo = first_min // BN // 32
    word_hi = (tl.cdiv(tl.minimum(row0 + shift + BM, key_len), BN) - 1) // 32
    b_x = tl.zeros([BM, DP], dtype=tl.float32)
    b_delta = tl.zeros([BM], dtype=tl.float32)
    b_da_sum = tl.zeros([BM], dtype=tl.float32)
    for i_w in range(word_lo, word_hi + 1):
        word = unsigned_word(tl.load(p_words + i_w))
        for _ in range(popcount(word).to(tl.int32)):
            lowest = word & (-word)
            key0 = (i_w * 32 + popcount(lowest - 1).to(tl.int32)) * BN
            word = word - lowest
            o_key = key0 + o_n
            m_key = (o_key < key_len)[:, None] & m_d[None, :]
            b_k = tl.load(p_k + o_key[:, None].to(tl.int64) * s_kl + o_d[None, :], mask=m_key, other=0.0)  # [BN, DP]
            b_v = tl.load(p_v + o_key[:, None].to(tl.int64) * s_vl + o_d[None, :], mask=m_key, other=0.0)  # [BN, DP]
            b_dot = product(b_q, tl.trans(b_k), PRECISION=PRECISION)
            b_s = add_bias(b_dot, p_table, qk_scale, row0 + shift - key0, window, BM, BN, STEP)
            b_p = tl.exp2(b_s - b_lse[:, None])
            if (key0 + BN > row0 + shift + 1) | (key0 < first_max):
                m_see = (o_key[None, :] <= o_pos[:, None]) & (o_key[None, :] >= o_first[:, None])
                b_p = tl.where((b_count == 1.0)[:, None], 1.0, b_p)  # exactly 1, not nearly
                b_p = tl.where(m_see, b_p, HIDDEN)
            b_da = product(b_do, tl.trans(b_v), PRECISION=PRECISION)
            b_dp = tl.where(b_p + b_tau[:, None] > 0.0, b_da, 0.0)
            b_pdp = b_p * b_dp
            b_delta += tl.sum(b_pdp, 1)
            b_da_sum += tl.sum(b_dp, 1)
            if NEED_DQ:
                b_x = product(b_pdp.to(b_k.dtype), b_k, b_x, PRECISION=PRECISION)
    tl.store(p_delta + o_rows, b_delta, mask=m_row)
    tl.store(p_da + o_rows, b_da_sum / b_count, mask=m_row)
    if NEED_DQ:
        b_mean = tl.load(p_mean + o_rows[:, None] * D + o_d[None, :], mask=m_tile, other=0.0)
        b_dq = (b_x - b_delta[:, None] * b_mean) * scale
        b_dq = tl.where((b_count == 1.0)[:, None], 0.0, b_dq)  # ds of a row of one key is 0
        tl.store(p_dq + o_rows[:, None] * D + o_d[None, :], b_dq.to(p_dq.dtype.element_ty), mask=m_tile)


@triton.jit
def key_kernel(
    p_q, p_k, p_v, p_do, p_table, p_tau, p_first, p_end, p_lse, p_delta, p_words, p_dk, p_dv,
    s_qb, s_qh, s_ql, s_kb, s_kh, s_kl, s_vb, s_vh, s_vl, s_gb, s_gh, s_gl,
    heads_kv, group, query_len, key_len, offset, window, num_tiles, num_words, num_mask_rows, qk_scale, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr,
    MM: tl.constexpr, MN: tl.constexpr, PACKED: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
    PRECISION: tl.constexpr, KEEP_V: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, Hkv, Lk, D], summed over the query heads of the group. Scores are kept as [keys, queries]."""
    i_n = tl.program_id(0)
    i_bkv = tl.program_id(1).to(tl.int64)
    i_b, i_kv = i_bkv // heads_kv, i_bkv % heads_kv
    shift = key_len - query_len
    key0 = i_n * BN
    o_key, o_d, o_r = key0 + tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, BM)
    m_d = o_d < D
    m_keys = (o_key < key_len)[:, None] & m_d[None, :]
    o_long = o_key[:, None].to(tl.int64)
    b_k = tl.load(p_k + i_b * s_kb + i_kv * s_kh + o_long * s_kl + o_d[None, :], mask=m_keys, other=0.0)  # [BN, DP]
    p_v_tile = p_v + i_b * s_vb + i_kv * s_vh + o_long * s_vl + o_d[None, :]
    if KEEP_V:
        b_v = tl.load(p_v_tile, mask=m_keys, other=0.0)  # [BN, DP]
    block_lo = tl.maximum(key0 - shift, 0) // BM
    row_end = query_len
    if PACKED:
        row_end = tl.load(p_end + tl.minimum(key0 + BN, key_len) - 1)
    block_hi = tl.cdiv(row_end, BM)

    b_dk = tl.zeros([BN, DP], dtype=tl.float32)
    b_dv = tl.zeros([BN, DP], dtype=tl.float32)
    for i_g in range(group):
        i_h = i_kv * group + i_g
        i_bh = i_b * (heads_kv * group) + i_h
        tau = tl.load(p_tau + i_h)
        p_head_table = p_table + i_h * num_tiles * (BM * BN)
        p_head_words = p_words + i_bh * num_mask_rows * num_words
        p_head_q = p_q + i_b * s_qb + i_h * s_qh
        p_head_do = p_do + i_b * s_gb + i_h * s_gh
        for i_m in range(block_lo, block_hi):
            row0 = i_m * BM
            o_m = row0 + o_r
            m_row = o_m < query_len
            m_tile = m_row[:, None] & m_d[None, :]
            o_rows = i_bh * query_len + o_m
            b_q = tl.load(
                p_head_q + o_m[:, None].to(tl.int64) * s_ql + o_d[None, :], mask=m_tile, other=0.0
            )  # [BM, DP]
            b_lse = tl.load(p_lse + o_rows, mask=m_row, other=float("inf"))  # p = 0 there
            b_delta = tl.load(p_delta + o_rows, mask=m_row, other=0.0)
            o_first, b_count = row_tokens(o_m, query_len, shift, offset, p_first, PACKED)
            b_dot = product(b_k, tl.trans(b_q), PRECISION=PRECISION)  # [BN, BM]
            b_s = add_bias_transposed(b_dot, p_head_table, qk_scale, row0 + shift - key0, window, BM, BN, STEP)
            b_p = tl.exp2(b_s - b_lse[None, :])
            first_max = 0
            if PACKED:
                first_max = tl.load(p_first + tl.minimum(row0 + BM, query_len) - 1)
            if (key0 + BN > row0 + shift + 1) | (key0 < first_max):
                m_see = (o_key[:, None] <= (o_m + shift)[None, :]) & (o_key[:, None] >= o_first[None, :])
                b_p = tl.where((b_count == 1.0)[None, :], 1.0, b_p)
                b_p = tl.where(m_see, b_p, HIDDEN)
            b_ds = tl.maximum(b_p, 0.0) * (0.0 - b_delta)[None, :]
            if block_is_active(p_head_words, i_m, i_n, num_words, BM, BN, MM, MN):
                b_do = tl.load(p_head_do + o_m[:, None].to(tl.int64) * s_gl + o_d[None, :], mask=m_tile, other=0.0)
                b_a = tl.maximum(b_p + (tau / b_count)[None, :], 0.0)
                if NEED_DV:
                    b_dv = product(b_a.to(b_do.dtype), b_do, b_dv, PRECISION=PRECISION)
                if NEED_DK:
                    if not KEEP_V:
                        b_v = tl.load(p_v_tile, mask=m_keys, other=0.0)
                    b_da = product(b_v, tl.trans(b_do), PRECISION=PRECISION)
                    b_ds += tl.where(b_a > 0.0, b_p * b_da, 0.0)
            if NEED_DK:
                b_dk = product(b_ds.to(b_q.dtype), b_q, b_dk, PRECISION=PRECISION)
    o_out = (i_bkv * key_len + o_key)[:, None] * D + o_d[None, :]
    if NEED_DK:
        tl.store(p_dk + o_out, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_keys)
    if NEED_DV:
        tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=m_keys)
