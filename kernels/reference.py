"""Lazy Attention written out in full: every [Lq, Lk] matrix is built, nothing is clever, autograd does the backward.

This is the oracle the other backends are tested against. It runs in any float dtype; scores and weights are computed
in float32, or in float64 when the inputs are float64.
"""

import math

import torch
from torch import Tensor

from lazypipe.kernels.stats import LazyStats, block_any

BLOCK_SIZE = (128, 128)
LOG2_E = math.log2(math.e)  # the other backends take exponentials to base 2: exp(s) = 2^(s LOG2_E)


def document_starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """First position of the document each of `length` packed positions belongs to, int64 [length]."""
    positions = torch.arange(length, device=cu_seqlens.device)
    boundaries = cu_seqlens.to(torch.int64)
    return boundaries[torch.searchsorted(boundaries, positions, right=True) - 1]


def lazy_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    tau: Tensor,
    cu_seqlens: Tensor | None,
    position_offset: int,
    scale: float,
) -> tuple[Tensor, LazyStats]:
    """Biased causal softmax followed by Elastic-Softmax (arXiv 2601.00919, eq. 5 to 8), materialised.

    Shapes as in `kernels.lazy_attention`. Returns the output [B, Hq, Lq, D] in q's dtype and the statistics
    (no gradient). Memory is O(B Hq Lq Lk) several times over.
    """
    query_len, key_len, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(compute).repeat_interleave(group, dim=1)
    values = v.to(compute).repeat_interleave(group, dim=1)

    query_at = torch.arange(query_len, device=q.device)[:, None] + (key_len - query_len)
    key_at = torch.arange(key_len, device=q.device)[None, :]
    first_key = torch.zeros_like(query_at)
    if cu_seqlens is not None:
        first_key = document_starts(cu_seqlens, query_len)[:, None]
    distance = query_at - key_at
    visible = (distance >= 0) & (key_at >= first_key)
    token_count = (query_at - first_key + 1 + position_offset).to(compute)  # n_i, [Lq, 1]

    window = bias.shape[1]
    distance_bias = bias.to(compute)[:, distance.clamp(0, window - 1)].masked_fill(distance >= window, 0.0)
    scores = (q.to(compute) * scale) @ keys.transpose(-1, -2) + distance_bias
    scores = scores.masked_fill(~visible, -torch.inf)
    probs = torch.softmax(scores, dim=-1)
    weights = torch.relu(probs + tau.to(compute)[:, None, None] / token_count).masked_fill(~visible, 0.0)
    out = (weights @ values).to(q.dtype)

    with torch.no_grad():
        used = weights > 0
        visible_count = visible.sum(-1)
        stats = LazyStats(
            lse=torch.logsumexp(scores, dim=-1).float(),
            surviving_mass=weights.sum(-1).float(),
            row_sparsity=1.0 - used.sum(-1).float() / visible_count,
            block_mask=block_any(used, BLOCK_SIZE),
            block_size=BLOCK_SIZE,
        )
    return out, stats
