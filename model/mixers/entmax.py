"""1.5-entmax attention (Peters et al. 2019, arXiv 1905.05702; Correia et al. 2019): softmax with exact zeros."""

import torch
from torch import Tensor

from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.mixers.costs import QUERY_ROWS
from lazypipe.model.mixers.query_blocks import RowwiseAttention, zero_share
from lazypipe.model.mixers.standard import visible


class EntmaxAttention(RowwiseAttention):
    """o_i = sum_j p_ij v_j, p_i = max(s_i / 2 - t_i, 0)^2 over j <= i, t_i such that the row sums to 1.

    Every row is sorted: L^2 log L time, and rows x L numbers per head for one block of query rows at a time.
    """

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        mask = visible(q.shape[2], k.shape[2], q.device)
        return entmax15(self.scores(q, k).masked_fill(~mask, -torch.inf))

    def sparsity(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        return zero_share(self.attention_rows(x, inputs, QUERY_ROWS), inputs.documents)


def entmax15(scores: Tensor) -> Tensor:
    """1.5-entmax of float scores [..., K] over the last dimension; -inf gets no weight, one score must be finite.

    The threshold comes from the sorted scores (Peters et al. 2019, algorithm 2). One Newton step on
    f(t) = sum max(x - t, 0)^2 - 1 then takes off the rounding of the running sums, and gives the gradient: with t
    fixed before the step, its derivative is -(df/dx) / (df/dt), that of the root. So dp = r (ds - <r, ds> / sum r),
    r = p^0.5.
    """
    # At most 1 below the largest x a weight is zero (the largest alone would sum to 1); so the floor changes nothing.
    x = ((scores - scores.amax(-1, keepdim=True).detach()) / 2).clamp(min=-2.0)
    fixed = x.detach()
    threshold = _sorted_threshold(fixed)
    slope = -2 * (fixed - threshold).clamp(min=0).sum(-1, keepdim=True)
    excess = (x - threshold).clamp(min=0).square().sum(-1, keepdim=True) - 1
    return (x - (threshold - excess / slope)).clamp(min=0).square()


def _sorted_threshold(x: Tensor) -> Tensor:
    """t [..., 1] with sum max(x - t, 0)^2 = 1, up to rounding; the largest x is 0."""
    descending = x.sort(dim=-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    mean = descending.cumsum(-1) / count
    variance = descending.square().cumsum(-1) / count - mean.square()
    candidates = mean - (1 / count - variance).clamp(min=0).sqrt()
    support = (candidates <= descending).sum(-1, keepdim=True)
    return candidates.gather(-1, support - 1)
