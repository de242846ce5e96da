"""What every token mixer offers, and what those that are attention share."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.cache import KVCache
from model.config import ModelConfig
from model.layers import Linear
from model.rope import Rope, apply_rope


class TokenMixer(nn.Module):
    """Mixes information between positions, causally. x is the normed layer input [B, L, hidden].

    `rope` holds the tables of exactly the L positions of x. The projection back into the residual stream is a Linear
    named `o_proj` (its initialisation is scaled down with depth).
    """

    @abstractmethod
    def forward(self, x: Tensor, rope: Rope, cache: KVCache | None = None) -> Tensor:
        """[B, L, hidden]. With a cache, x continues the tokens the cache has seen, and is added to it."""

    @abstractmethod
    def new_cache(self, max_tokens: int) -> KVCache:
        """An empty decoding cache with room for `max_tokens` tokens."""

    @abstractmethod
    def attention_rows(self, x: Tensor, rope: Rope, query_block: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (query_start, weights [B, H, rows, L] float32) from the first query to the last.

        The weights are those multiplied with V: exact zeros included, future positions 0. At most `query_block` rows
        exist at a time.
        """

    def sparsity(self, x: Tensor, rope: Rope) -> Tensor | None:  # noqa: ARG002
        """Share of exactly-zero weights among all (query, visible key) pairs, [H] float32; None where none can be."""
        return None


class AttentionMixer(TokenMixer):
    """Multi-head attention around two functions a subclass gives: the output of all queries, the weights of a few.

    Grouped-query attention when config.kv_heads < config.num_heads: query head h reads key/value head
    h // (num_heads / kv_heads).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.scale = self.head_dim**-0.5
        self.q_proj = Linear(config.hidden_size, self.num_heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, Lq, D] against k, v [B, Hkv, Lk, D]: output [B, H, Lq, D]. The queries are the last Lq positions."""

    @abstractmethod
    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The weights [B, H, Lq, Lk] float32 that `attend` multiplies with V."""

    def forward(self, x: Tensor, rope: Rope, cache: KVCache | None = None) -> Tensor:
        q, k = self.queries_and_keys(x, rope)
        v = self._heads(self.v_proj(x), self.kv_heads)
        if cache is not None:
            k, v = cache.append(k, v)
        out: Tensor = self.o_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return out

    def new_cache(self, max_tokens: int) -> KVCache:
        return KVCache(max_tokens)

    def attention_rows(self, x: Tensor, rope: Rope, query_block: int) -> Iterator[tuple[int, Tensor]]:
        q, k = self.queries_and_keys(x, rope)
        length = q.shape[2]
        for start in range(0, length, query_block):
            end = min(start + query_block, length)
            weights = self.weights(q[:, :, start:end], k[:, :, :end])
            yield start, nn.functional.pad(weights, (0, length - end))

    def queries_and_keys(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, H, L, D] and keys [B, Hkv, L, D]."""
        q = self._heads(self.q_proj(x), self.num_heads)
        k = self._heads(self.k_proj(x), self.kv_heads)
        return apply_rope(q, rope), apply_rope(k, rope)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q . k / sqrt(D) in float32, autocast or not, [B, H, Lq, Lk], before any mask."""
        keys = k.float().repeat_interleave(self.num_heads // self.kv_heads, dim=1)
        with torch.autocast(q.device.type, enabled=False):
            scores: Tensor = (q.float() * self.scale) @ keys.transpose(-1, -2)
        return scores

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)
