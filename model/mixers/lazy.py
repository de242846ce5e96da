"""Lazy Attention (arXiv 2601.00919): RoPE and a learnable distance bias, then Elastic-Softmax."""

import torch
from torch import Tensor, nn

from kernels import lazy_attention
from model.config import ModelConfig
from model.mixers.interface import AttentionMixer, SideInputs
from model.mixers.standard import visible
from model.rope import Rope


class LazyAttention(AttentionMixer):
    """o_i = sum_j a_ij v_j with a_ij = max(softmax_j(s_ij) + tau / n_i, 0), n_i = i + 1,
    s_ij = q_i . k_j / sqrt(D) + bias[i - j], the bias up to distance W - 1.

    bias [H, W] and tau [H] stay float32 under autocast: at learning rate 1e-3 their updates vanish in bfloat16.
    `kernel` is the backend of `kernels.lazy_attention`.
    """

    def __init__(self, config: ModelConfig, kernel: str = "auto") -> None:
        super().__init__(config)
        self.kernel = kernel
        self.bias = nn.Parameter(torch.empty(config.num_heads, config.max_bias_length, dtype=torch.float32))
        self.tau = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lazy_attention(q, k, v, self.bias, self.tau, scale=self.scale, backend=self.kernel)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        query_len, key_len = q.shape[2], k.shape[2]
        window = self.bias.shape[1]
        position = torch.arange(key_len - query_len, key_len, device=q.device)[:, None]
        distance = position - torch.arange(key_len, device=q.device)
        bias = self.bias[:, distance.clamp(0, window - 1)].masked_fill(distance >= window, 0.0)
        mask = visible(query_len, key_len, q.device)
        probs = torch.softmax((self.scores(q, k) + bias).masked_fill(~mask, -torch.inf), dim=-1)
        # A tau above zero would lift the future too, so the mask comes after the max.
        return torch.relu(probs + self.tau[:, None, None] / (position + 1)).masked_fill(~mask, 0.0)

    def sparsity(self, x: Tensor, rope: Rope, side: SideInputs | None = None) -> Tensor:
        q, k = self.queries_and_keys(x, rope, side)
        v = self._heads(self.v_proj(x), self.kv_heads)
        _, stats = lazy_attention(
            q, k, v, self.bias, self.tau, scale=self.scale, backend=self.kernel, return_stats=True
        )
        visible_keys = torch.arange(1, x.shape[1] + 1, dtype=torch.float32, device=x.device)
        zeros: Tensor = (stats.row_sparsity * visible_keys).sum(-1) / visible_keys.sum()
        return zeros.mean(0)
