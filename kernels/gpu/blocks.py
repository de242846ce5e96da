"""What every Triton kernel here does to one block of scores, and to one word of the block mask.

Prefixes: p_ pointer, b_ block of values, o_ offsets, m_ boolean mask, i_ index. Scores are in log2 units (multiplied
by log2 e), so that exp2 is the only exponential. The block mask holds one bit per (query block, key block), 32 to an
int32.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
import triton
import triton.language as tl

# p of a hidden pair: far below any -tau / n, so no threshold lets it through, and finite, so that 0 p is 0.
HIDDEN = tl.constexpr(-1e30)


@triton.jit
def product(x, y, accumulator=None, PRECISION: tl.constexpr = "ieee"):
    """x y (+ accumulator) in float32. "upcast" is for the interpreter, whose dot takes bfloat16 for integers."""
    if PRECISION == "upcast":
        return tl.dot(x.to(tl.float32), y.to(tl.float32), accumulator)
    return tl.dot(x, y, accumulator, input_precision=PRECISION)


@triton.jit
def add_bias(b_dot, p_table, qk_scale, delta, window, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr):
    """Scores [BM, BN] of the block whose first query stands `delta` after its first key; no loads beyond the window.

    p_table: Toeplitz tiles of one head, [tiles, BM, BN], see lazypipe.kernels.gpu.toeplitz.
    """
    b_s = b_dot * qk_scale
    if delta < window + BN - 1:
        o_tile = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        b_s += tl.load(p_table + ((delta + BM) // STEP) * (BM * BN) + o_tile)
    return b_s


@triton.jit
def add_bias_transposed(
    b_dot, p_table, qk_scale, delta, window, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr
):
    """The same for scores [BN, BM] (keys x queries) and tiles [tiles, BN, BM]."""
    b_s = b_dot * qk_scale
    if delta < window + BN - 1:
        o_tile = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        b_s += tl.load(p_table + ((delta + BM) // STEP) * (BM * BN) + o_tile)
    return b_s


@triton.jit
def row_tokens(o_m, query_len, shift, offset, p_first, PACKED: tl.constexpr):
    """(first visible key, n_i as float32) of each query row; rows beyond the end see from key 0."""
    o_first = tl.zeros_like(o_m)
    if PACKED:
        o_first = tl.load(p_first + o_m, mask=o_m < query_len, other=0)
    b_count = (o_m + shift + offset + 1 - o_first).to(tl.float32)
    return o_first, b_count


@triton.jit
def bitwise_or(x, y):
    return x | y


@triton.jit
def popcount(word):
    """Number of set bits of an int64 scalar below 2^32, by arithmetic: the interpreter has no such intrinsic."""
    x = word - ((word >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@triton.jit
def unsigned_word(word):
    """An int32 mask word as a non-negative int64."""
    return word.to(tl.int64) & 0xFFFFFFFF


@triton.jit
def block_is_active(
    p_words, i_m, i_n, num_words, BM: tl.constexpr, BN: tl.constexpr, MM: tl.constexpr, MN: tl.constexpr
):
    """Whether block (i_m, i_n) of BM x BN meets an active block of the mask, which was written for MM x MN blocks.

    p_words: the words of one head. BM divides MM; BN divides MN or is a multiple of it (at most 32 times).
    """
    i_first = i_n * BN // MN
    i_row = i_m * BM // MM
    word = unsigned_word(tl.load(p_words + i_row * num_words + i_first // 32))
    together: tl.constexpr = (BN + MN - 1) // MN
    return ((word >> (i_first % 32)) & ((1 << together) - 1)) != 0
