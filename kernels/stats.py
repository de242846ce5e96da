"""What a pass of Lazy Attention can say about itself at no extra cost."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LazyStats(NamedTuple):
    """Statistics of one `lazy_attention` call. None of them carries a gradient.

    lse             [B, Hq, Lq] float32: log-sum-exp of the biased scores of each row (natural logarithm).
    surviving_mass  [B, Hq, Lq] float32: sum_j a_ij, the attention left after Elastic-Softmax (1 for plain softmax).
    row_sparsity    [B, Hq, Lq] float32: share of exactly-zero weights among the keys at hand that the query may see.
    block_mask      [B, Hq, ceil(Lq / rows), ceil(Lk / columns)] bool: False only where all weights are zero.
    block_size      (rows, columns) of one block of `block_mask`; it differs between backends.
    """

    lse: Tensor
    surviving_mass: Tensor
    row_sparsity: Tensor
    block_mask: Tensor
    block_size: tuple[int, int]


def block_any(used: Tensor, block_size: tuple[int, int]) -> Tensor:
    """True for each block of `used` [..., Lq, Lk] (bool) that holds at least one True."""
    rows, columns = block_size
    padded = F.pad(used, (0, -used.shape[-1] % columns, 0, -used.shape[-2] % rows))
    tiles = torch.unflatten(torch.unflatten(padded, -1, (-1, columns)), -3, (-1, rows))
    return tiles.any(-1).any(-2)
