"""Elliptical attention (Nielsen et al. 2024, arXiv 2406.13770): what changes between layers counts for more."""

from typing import ClassVar

import torch
from torch import Tensor

from lazypipe.model.cache import KVCache, LayerCache
from lazypipe.model.mixers.base import BlockInputs, BlockOutputs
from lazypipe.model.mixers.standard import StandardAttention
from lazypipe.model.rope import apply_rope


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

    def forward(self, x: Tensor, inputs: BlockInputs, cache: LayerCache | None = None) -> BlockOutputs:
        v = self.new_values(x)
        values = self.returned_values(v, inputs)
        assert cache is None or isinstance(cache, EllipticalCache)
        q, k = self._stretched(x, v, inputs, cache)
        if cache is not None:
            k, v = cache.append(k, v)
        return BlockOutputs(self.project(self.attend_documents(q, k, v, inputs.documents)), values)

    def new_cache(self, max_tokens: int) -> LayerCache:
        return EllipticalCache(max_tokens)

    def queries_and_keys(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        return self._stretched(x, self.new_values(x), inputs, None)

    def _stretched(
        self, x: Tensor, v: Tensor, inputs: BlockInputs, cache: EllipticalCache | None
    ) -> tuple[Tensor, Tensor]:
        """Queries times m, and keys, both rotated; the cache's sum goes on to the last token of x."""
        q, k = self.unrotated(x)
        below, documents = inputs.values, inputs.documents
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
        return apply_rope(q, inputs.rope), apply_rope(k, inputs.rope)


def _running_sum(x: Tensor) -> Tensor:
    return x.cumsum(dim=2)
