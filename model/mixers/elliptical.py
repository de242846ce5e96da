"""Elliptical attention (Nielsen et al. 2024, arXiv 2406.13770): what changes between layers counts for more."""

from typing import ClassVar

import torch
from torch import Tensor

from lazypipe.model.cache import KVCache, LayerCache
from lazypipe.model.mixers.base import SideInputs, documents_of
from lazypipe.model.mixers.standard import StandardAttention
from lazypipe.model.packing import Documents
from lazypipe.model.rope import Rope, apply_rope


class EllipticalCache(KVCache):
    """A KV cache and the sum of abs(v - v of the layer below) over the tokens seen, float32 [B, Hkv, 1, D]."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__(max_tokens)
        self.change = torch.zeros(())


class EllipticalAttention(StandardAttention):
    """o_i = sum_j softmax_j((m_i * q_i) . k_j / sqrt(D)) v_j, m_i before RoPE, without gradient:

    m_i = mean over j <= i of abs(v_j - v_j of the attention layer below), per key/value head and coordinate, divided by
    its largest coordinate. The first attention layer has m = 1. (The original averages over the whole sequence, which a
    causal model cannot see.)
    """

    reads_values: ClassVar[bool] = True

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None = None, side: SideInputs | None = None) -> Tensor:
        below = None if side is None else side.values
        v = self.new_values(x, side)
        assert cache is None or isinstance(cache, EllipticalCache)
        q, k = self._stretched(x, v, below, rope, cache, documents_of(side))
        if cache is not None:
            k, v = cache.append(k, v)
        return self.project(self.attend_documents(q, k, v, side))

    def new_cache(self, max_tokens: int) -> LayerCache:
        return EllipticalCache(max_tokens)

    def queries_and_keys(self, x: Tensor, rope: Rope, side: SideInputs | None = None) -> tuple[Tensor, Tensor]:
        below = None if side is None else side.values
        return self._stretched(x, self.new_values(x), below, rope, None, documents_of(side))

    def _stretched(
        self,
        x: Tensor,
        v: Tensor,
        below: Tensor | None,
        rope: Rope,
        cache: EllipticalCache | None,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor]:
        """Queries times m, and keys, both rotated; the cache's sum goes on to the last token of x."""
        q, k = self.unrotated(x)
        if below is not None:
            with torch.no_grad():
                change = (v.float() - below.float()).abs()
                change = _running_sum(change) if documents is None else documents.each(_running_sum, change)
                if cache is not None:
                    change = change + cache.change.to(change.device)
                    cache.change = change[:, :, -1:].clone()  # a view would keep the sums of the whole prompt
                # Dividing by the largest coordinate makes the sum as good as the mean. Where nothing changed, m = 1.
                largest = change.amax(-1, keepdim=True)
                stretch = torch.where(largest > 0, change / largest.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
            q = (q.float() * self.per_query_head(stretch)).to(q.dtype)
        return apply_rope(q, rope), apply_rope(k, rope)


def _running_sum(x: Tensor) -> Tensor:
    return x.cumsum(dim=2)
