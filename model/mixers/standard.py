"""Causal softmax attention (Vaswani et al. 2017) through torch's scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lazypipe.model.mixers.base import AttentionMixer


class StandardAttention(AttentionMixer):
    """softmax(Q K^T / sqrt(D)) V over positions j <= i."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query_len, key_len = q.shape[2], k.shape[2]
        # torch's is_causal aligns the first query with the first key; with a cache the last ones must meet.
        mask = None
        if 1 < query_len < key_len:
            mask = visible(query_len, key_len, q.device)
        grouped = self.num_heads != self.kv_heads
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=query_len == key_len, scale=self.scale, enable_gqa=grouped
        )

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        mask = visible(q.shape[2], k.shape[2], q.device)
        return torch.softmax(self.scores(q, k).masked_fill(~mask, -torch.inf), dim=-1)


def visible(query_len: int, key_len: int, device: torch.device) -> Tensor:
    """Causal mask bool [query_len, key_len], True where the key may be seen; the queries are the last positions."""
    return torch.ones(query_len, key_len, dtype=torch.bool, device=device).tril(key_len - query_len)
