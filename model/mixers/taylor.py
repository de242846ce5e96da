"""Attention by the Taylor series of exp to second order ("approximate" in "Deconstructing Attention", 2510.11602).

Normalised jointly, as in Based (Arora et al. 2024), with the full head as feature dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lazypipe.model.cache import LayerCache, RecurrentState
from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.base import AttentionMixer, BlockInputs, BlockOutputs
from lazypipe.model.mixers.costs import TAYLOR_CHUNK, TAYLOR_STATE_FROM, taylor_features
from lazypipe.model.mixers.standard import visible


class TaylorAttention(AttentionMixer):
    """a_ij = w(s_ij) / sum_{j'<=i} w(s_ij'), w(s) = 1 + s + s^2 / 2 >= 1/2, s_ij = q_i . k_j / sqrt(D), with RoPE.

    w(s_ij) is an inner product of features of q_i and of k_j, 1 + D + D (D + 1) / 2 of them (2145 at D = 64). So there
    are two ways to the same output: all pairs, or a state of [features, D + 1] per head that grows with every key.
    Training takes the faster one for the length, decoding always the state.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.features = taylor_features(config)

    def forward(self, x: Tensor, inputs: BlockInputs, cache: LayerCache | None = None) -> BlockOutputs:
        if cache is None:
            return super().forward(x, inputs)
        assert isinstance(cache, RecurrentState)
        q, k = self.queries_and_keys(x, inputs)
        v = self.new_values(x)
        out, state = self.attend_by_state(q, k, v, cache.tensors[0] if cache.tensors else None)
        cache.tensors = (state,)
        return BlockOutputs(self.project(out), self.returned_values(v, inputs))

    def new_cache(self, max_tokens: int) -> LayerCache:  # noqa: ARG002
        return RecurrentState()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] > TAYLOR_STATE_FROM * self.features:
            return self.attend_by_state(q, k, v, None)[0]
        with torch.autocast(q.device.type, enabled=False):
            return (self.weights(q, k) @ self.per_query_head(v).float()).to(v.dtype)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        mask = visible(q.shape[2], k.shape[2], q.device)
        unnormalised = second_order(self.scores(q, k)).masked_fill(~mask, 0.0)
        return unnormalised / unnormalised.sum(-1, keepdim=True)

    def attend_by_state(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output [B, H, L, D] in linear time, and the state [B, Hkv, features, D + 1] float32 after these tokens.

        q [B, H, L, D], k, v [B, Hkv, L, D]: the tokens after those of `state` (None: there are none before).
        """
        batch_size, length = q.shape[0], q.shape[2]
        with torch.autocast(q.device.type, enabled=False):
            grouped = q.float().reshape(batch_size, self.kv_heads, -1, length, self.head_dim)
            keys, values = k.float(), F.pad(v.float(), (0, 1), value=1.0)
            if state is None:
                state = values.new_zeros(batch_size, self.kv_heads, self.features, self.head_dim + 1)
            outputs = []
            # Split, not sliced: the gradient of a slice is as long as the whole, and there is one per chunk.
            queries_of, keys_of, values_of = (torch.split(one, TAYLOR_CHUNK, dim=-2) for one in (grouped, keys, values))
            for part in zip(queries_of, keys_of, values_of, strict=True):
                if torch.is_grad_enabled():
                    # The features of all keys and queries would take 33 times the memory of the keys and queries.
                    out, state = checkpoint(self._chunk, *part, state, use_reentrant=False, preserve_rng_state=False)
                else:
                    out, state = self._chunk(*part, state)
                outputs.append(out)
            sums = torch.cat(outputs, dim=3).flatten(1, 2)
            return (sums[..., :-1] / sums[..., -1:]).to(v.dtype), state

    def _chunk(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(sums [B, Hkv, G, C, D + 1] of weighted values and of weights, next state); q [B, Hkv, G, C, D]."""
        inside = second_order((q * self.scale) @ k[:, :, None].transpose(-1, -2)).tril()
        sums = inside @ v[:, :, None] + self._expand(q) @ state[:, :, None]
        return sums, state + self._expand(k).transpose(-1, -2) @ v

    def _expand(self, x: Tensor) -> Tensor:
        """Features [..., features] of x [..., D], so that expand(q) . expand(k) = w(q . k / sqrt(D))."""
        x = x * self.scale**0.5
        first, second = torch.triu_indices(self.head_dim, self.head_dim, device=x.device)
        # s^2 holds x_i x_j of i < j twice, so halved once; the squares keep their half.
        factor = torch.where(first == second, 0.5**0.5, 1.0)
        return torch.cat((torch.ones_like(x[..., :1]), x, x[..., first] * x[..., second] * factor), dim=-1)


def second_order(scores: Tensor) -> Tensor:
    """1 + s + s^2 / 2, never below 1/2."""
    return 1 + scores + 0.5 * scores.square()
