"""Attention with linear biases (Press et al. 2022, arXiv 2108.12409) in place of RoPE."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lazypipe.model.mixers.base import AttentionMixer, BlockInputs
from lazypipe.model.mixers.query_blocks import in_query_blocks


class AlibiAttention(AttentionMixer):
    """o_i = sum_j softmax_j(s_ij - m_h (i - j)) v_j over j <= i, with unrotated q and k and a fixed slope m_h per head.

    torch's fused attention with the bias as its mask, [H, rows, Lk] for a block of query rows at a time. Under bfloat16
    autocast the mask is rounded too: a bias b is off by b / 512 at most, its weight by a factor exp(b / 512) where the
    weight itself is down by exp(-b); the output's own rounding is larger.
    """

    def queries_and_keys(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self.unrotated(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return in_query_blocks(self._attend_rows, q, k, v)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax(self.scores(q, k) + self._bias(q.shape[2], k.shape[2], q.device), dim=-1)

    def _attend_rows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self._bias(q.shape[2], k.shape[2], q.device).to(q.dtype)
        grouped = self.num_heads != self.kv_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=self.scale, enable_gqa=grouped)

    def _bias(self, query_len: int, key_len: int, device: torch.device) -> Tensor:
        """-m_h (i - j), float32 [H, query_len, key_len]; -inf in the future."""
        positions = torch.arange(key_len, device=device, dtype=torch.float32)
        distance = positions[key_len - query_len :, None] - positions
        slopes = torch.tensor(alibi_slopes(self.num_heads), device=device)
        return (-slopes[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)


def alibi_slopes(num_heads: int) -> list[float]:
    """m_h = 2^(-8 h / H) for h = 1 ... H when H is a power of two.

    Otherwise, as its authors do: the slopes of the largest power of two below, then every second one of twice as many.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * head / power) for head in range(1, power + 1)]
    between = [2.0 ** (-8 * head / (2 * power)) for head in range(1, 2 * power + 1, 2)]
    return slopes + between[: num_heads - power]
