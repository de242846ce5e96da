"""The distance bias as a few small tiles.

bias[i - j] is the same for every block whose first query and first key stand equally far apart, so a head needs only
about W / block + 2 distinct tiles. Expanded once per call they are read with wide coalesced loads, where a gather
would cost one load instruction per score. The gradient goes the same way back: tiles of ds, summed along their
diagonals.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def tile_step(block_m: int, block_n: int) -> int:
    """Distances between first query and first key move in this step: the smaller of two powers of two."""
    return min(block_m, block_n)


def tile_count(window: int, shift: int, block_m: int, block_n: int) -> int:
    """Tiles per head that blocks with a pair inside the window can need (shift = Lk - Lq)."""
    step = tile_step(block_m, block_n)
    return (window + block_n - 2 - shift % step) // step + block_m // step + 1


def bias_tiles(bias: Tensor, shift: int, block_m: int, block_n: int, transposed: bool = False) -> Tensor:
    """bias [H, W] -> tiles [H, T, BM, BN] (or [H, T, BN, BM]), float32, in log2 units.

    Tile t holds bias[h, delta + m - n], delta = shift % step + (t - BM / step) step, and 0 outside 0 <= . < W.
    Contiguous, as the kernels index it.
    """
    heads, window = bias.shape
    step = tile_step(block_m, block_n)
    count = tile_count(window, shift, block_m, block_n)
    remainder = shift % step
    lowest = remainder - block_m - (block_n - 1)  # smallest delta + m - n
    length = (count - 1) * step + block_m + block_n - 1
    line = F.pad(bias.float() * math.log2(math.e), (-lowest, max(0, length + lowest - window)))
    strides = (line.shape[1], step, 1, 1)
    # flip keeps the order of its input's strides, and between two equal ones it may put either dimension innermost:
    # 16 x 32 tiles came out with strides (1, 16), a transposed bias to a kernel that counts (32, 1).
    if transposed:
        return line.as_strided((heads, count, block_n, block_m), strides).flip(2).contiguous()
    return line.as_strided((heads, count, block_m, block_n), strides).flip(3).contiguous()


def bias_gradient(tiles: Tensor, first_delta: int, step: int, window: int) -> Tensor:
    """Sums tiles of ds [H, T, BM, BN], tile t at distance first_delta + t step, along diagonals into dbias [H, W].

    A gather and a sum, not a scatter: the order of additions never changes.
    """
    heads, count, block_m, block_n = tiles.shape
    padded = F.pad(tiles.flip(3), (0, block_m)).flatten(2)[..., :-block_m]
    diagonals = torch.unflatten(padded, 2, (block_m, block_m + block_n - 1)).sum(2)  # index m + (BN - 1 - n)
    first = torch.arange(count, device=tiles.device)[:, None] * step + first_delta - (block_n - 1)
    index = torch.arange(window, device=tiles.device)[None, :] - first  # [T, W]
    inside = (index >= 0) & (index < block_m + block_n - 1)
    index = index.clamp(0, block_m + block_n - 2).expand(heads, -1, -1)
    return (diagonals.gather(2, index) * inside).sum(1)
