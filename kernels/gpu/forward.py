"""The Triton forward: one program per tile of query rows, two walks over its keys.

Walk 1 goes from the diagonal outwards and builds the log-sum-exp of each row. A block is marked when its row maximum
exceeds the running lse + log2(-tau / n): the lse only grows, so marks are a superset of the blocks with a positive
weight, and starting where the mass usually is keeps it tight. In training this walk also builds M_i = sum_j p_ij k_j,
which saves the backward a walk over the empty blocks. Walk 2 visits marked blocks only, adds a_ij v_j, and writes the
exact mask.

Matrix products per causal block, rho = share of marked blocks: 1 + 2 rho for inference, 2 + 2 rho in training.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
import triton
import triton.language as tl

from lazypipe.kernels.gpu.blocks import HIDDEN, add_bias, bitwise_or, popcount, product, row_tokens, unsigned_word

# Marks are taken this much (in log2) below the threshold, far more than the rounding between the two walks.
MARK_SLACK = tl.constexpr(1e-3)


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_table, p_tau, p_first, p_out, p_lse, p_mean, p_mass, p_used, p_words,
    s_qb, s_qh, s_ql, s_kb, s_kh, s_kl, s_vb, s_vh, s_vl,
    heads_q, group, query_len, key_len, offset, window, num_tiles, num_words, qk_scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, WORDS: tl.constexpr,
    PACKED: tl.constexpr, TRAINING: tl.constexpr, STATS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)  # longest rows first
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // heads_q, i_bh % heads_q
    i_kv = i_h // group
    shift = key_len - query_len
    row0 = i_m * BM
    o_m, o_n, o_d = row0 + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP)
    m_row, m_d = o_m < query_len, o_d < D
    o_pos = o_m + shift
    o_first, b_count = row_tokens(o_m, query_len, shift, offset, p_first, PACKED)
    first_min, first_max = 0, 0
    if PACKED:
        first_min = tl.load(p_first + row0)
        first_max = tl.load(p_first + tl.minimum(row0 + BM, query_len) - 1)
    tau = tl.load(p_tau + i_h)
    b_tau = tau / b_count
    b_log = tl.log2(tl.maximum(-tau, 0.0) / b_count)  # -inf for tau >= 0: every block is marked

    p_k += i_b * s_kb + i_kv * s_kh
    p_v += i_b * s_vb + i_kv * s_vh
    p_table += i_h * num_tiles * (BM * BN)
    p_rows = p_q + i_b * s_qb + i_h * s_qh + o_m[:, None].to(tl.int64) * s_ql + o_d[None, :]
    b_q = tl.load(p_rows, mask=m_row[:, None] & m_d[None, :], other=0.0)  # [BM, DP]

    block_lo = first_min // BN
    block_hi = tl.cdiv(tl.minimum(row0 + shift + BM, key_len), BN)
    word_lo, word_hi = block_lo // 32, (block_hi - 1) // 32
    o_w = tl.arange(0, WORDS)
    b_marks = tl.zeros([WORDS], dtype=tl.int32)
    b_max = tl.full([BM], -1e30, dtype=tl.float32)  # finite: a wholly masked first tile must not give inf - inf
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_mean = tl.zeros([BM, DP], dtype=tl.float32)

    for i_back in range(word_hi - word_lo + 1):
        i_w = word_hi - i_back
        top = tl.minimum(block_hi, i_w * 32 + 32)
        bottom = tl.maximum(block_lo, i_w * 32)
        b_bits = tl.zeros([BM], dtype=tl.int32)
        for i_step in range(top - bottom):
            i_n = top - 1 - i_step
            key0 = i_n * BN
            o_key = key0 + o_n
            m_key = (o_key < key_len)[:, None] & m_d[None, :]
            b_k = tl.load(p_k + o_key[:, None].to(tl.int64) * s_kl + o_d[None, :], mask=m_key, other=0.0)  # [BN, DP]
            b_dot = product(b_q, tl.trans(b_k), PRECISION=PRECISION)
            b_s = add_bias(b_dot, p_table, qk_scale, row0 + shift - key0, window, BM, BN, STEP)
            if (key0 + BN > row0 + shift + 1) | (key0 < first_max):
                m_see = (o_key[None, :] <= o_pos[:, None]) & (o_key[None, :] >= o_first[:, None])
                b_s = tl.where(m_see, b_s, float("-inf"))
            b_peak = tl.max(b_s, 1)
            b_new = tl.maximum(b_max, b_peak)
            b_p = tl.exp2(b_s - b_new[:, None])
            b_alpha = tl.exp2(b_max - b_new)
            b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
            if TRAINING:
                b_mean = product(b_p.to(b_k.dtype), b_k, b_mean * b_alpha[:, None], PRECISION=PRECISION)
            m_mark = b_peak > b_new + tl.log2(b_sum) + (b_log - MARK_SLACK)
            b_bits |= tl.where(m_mark & m_row, 1, 0) << (i_n - i_w * 32)
            b_max = b_new
        b_marks = tl.where(o_w == i_w, tl.reduce(b_bits, 0, bitwise_or), b_marks)

    b_lse = b_max + tl.log2(b_sum)
    o_rows = i_bh * query_len + o_m
    tl.store(p_lse + o_rows, b_lse, mask=m_row)
    if TRAINING:
        p_mean += o_rows[:, None] * D + o_d[None, :]
        tl.store(p_mean, b_mean / b_sum[:, None], mask=m_row[:, None] & m_d[None, :])

    b_out = tl.zeros([BM, DP], dtype=tl.float32)
    b_mass = tl.zeros([BM], dtype=tl.float32)
    b_used = tl.zeros([BM], dtype=tl.float32)
    for i_w in range(word_lo, word_hi + 1):
        word = unsigned_word(tl.sum(tl.where(o_w == i_w, b_marks, 0), 0))
        b_bits = tl.zeros([BM], dtype=tl.int32)
        for _ in range(popcount(word).to(tl.int32)):
            lowest = word & (-word)
            i_bit = popcount(lowest - 1).to(tl.int32)
            word = word - lowest
            key0 = (i_w * 32 + i_bit) * BN
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
            b_a = tl.maximum(b_p + b_tau[:, None], 0.0)
            b_bits |= tl.where((tl.max(b_a, 1) > 0.0) & m_row, 1, 0) << i_bit
            b_out = product(b_a.to(b_v.dtype), b_v, b_out, PRECISION=PRECISION)
            if STATS:
                b_mass += tl.sum(b_a, 1)
                b_used += tl.sum(tl.where(b_a > 0.0, 1.0, 0.0), 1)
        i_word = (i_bh * tl.num_programs(0) + i_m) * num_words + i_w
        tl.store(p_words + i_word, tl.reduce(b_bits, 0, bitwise_or))

    p_out += o_rows[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])
    if STATS:
        tl.store(p_mass + o_rows, b_mass, mask=m_row)
        tl.store(p_used + o_rows, b_used, mask=m_row)
