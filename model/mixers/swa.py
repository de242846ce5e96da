"""Sliding-window attention (Longformer, Mistral), with the first tokens kept in sight if wanted (StreamingLLM)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.mixers.costs import QUERY_ROWS
from lazypipe.model.mixers.query_blocks import zero_share
from lazypipe.model.mixers.standard import StandardAttention


class SlidingWindowAttention(StandardAttention):
    """Softmax over the keys j <= i with i - j < window or j < sink_tokens. window counts the query's own position.

    Blocks of QUERY_ROWS queries see only the keys some of them need, so time and memory grow with
    L (window + sink_tokens + QUERY_ROWS). Sink tokens keep their true positions under RoPE (StreamingLLM renumbers them
    within its cache). The decoding cache holds all keys; only the visible ones are read.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.window, self.sink_tokens = config.swa_window, config.swa_sink_tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] <= self.window:
            return super().attend(q, k, v)
        seen_before = k.shape[2] - q.shape[2]
        outputs = []
        for start in range(0, q.shape[2], QUERY_ROWS):
            rows = q[:, :, start : start + QUERY_ROWS]
            outputs.append(self._attend_rows(rows, k, v, seen_before + start))
        return torch.cat(outputs, dim=2)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        keys = torch.arange(k.shape[2], device=q.device)
        mask = self._visible(keys[k.shape[2] - q.shape[2] :], keys)
        return torch.softmax(self.scores(q, k).masked_fill(~mask, -torch.inf), dim=-1)

    def sparsity(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        return zero_share(self.attention_rows(x, inputs, QUERY_ROWS), inputs.documents)

    def _attend_rows(self, q: Tensor, k: Tensor, v: Tensor, first_query: int) -> Tensor:
        last_key = first_query + q.shape[2]
        first_key = max(0, first_query - self.window + 1)
        sinks = min(self.sink_tokens, first_key)
        queries = torch.arange(first_query, last_key, device=q.device)
        keys = torch.arange(first_key, last_key, device=q.device)
        if sinks:
            k, v = (torch.cat((one[:, :, :sinks], one[:, :, first_key:last_key]), dim=2) for one in (k, v))
            keys = torch.cat((torch.arange(sinks, device=q.device), keys))
        else:
            k, v = k[:, :, first_key:last_key], v[:, :, first_key:last_key]
        mask = self._visible(queries, keys)
        grouped = self.num_heads != self.kv_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=grouped)

    def _visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Mask bool [queries, keys] of positions int64: True where the key may be seen."""
        distance = queries[:, None] - keys
        return (distance >= 0) & ((distance < self.window) | (keys < self.sink_tokens))
