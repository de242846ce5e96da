"""Softmax with a learned sink per head (gpt-oss, 2025): a head learns how readily it attends to nothing."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lazypipe.model.cache import LayerCache
from lazypipe.model.config import ModelConfig
from lazypipe.model.layers import Draw
from lazypipe.model.mixers.base import AttentionMixer, BlockInputs, BlockOutputs
from lazypipe.model.mixers.null_key import attend_with_null_key, weights_beside_null_key


class SinkAttention(AttentionMixer):
    """o_i = sum_{j <= i} exp(s_ij) v_j / (exp(sink) + sum_{j <= i} exp(s_ij)), one logit `sink` per head.

    sink [H] stays float32 under autocast and starts at 0, where the mixer equals softmax1.
    """

    undecayed: ClassVar[tuple[str, ...]] = ("sink",)  # decay would pull every head to softmax1

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.sink = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))

    def initialise(self, draw: Draw) -> None:
        draw.constant("sink", 0.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_with_null_key(q, k, v, self.scale, self.sink)

    def forward(self, x: Tensor, inputs: BlockInputs, cache: LayerCache | None = None) -> BlockOutputs:
        """As of every mixer. The head mass is that of whole inputs: it does not go with a cache (ValueError)."""
        if not inputs.returns_head_mass:
            return super().forward(x, inputs, cache)
        if cache is not None:
            raise ValueError("the head mass of sink was asked for beside a decoding cache; give one of the two")
        q, k = self.queries_and_keys(x, inputs)
        v = self.new_values(x)
        documents = inputs.documents
        out = self._with_mass(q, k, v) if documents is None else documents.each(self._with_mass, q, k, v)
        head_mass = out[..., -1].float().mean((0, 2))
        return BlockOutputs(self.project(out[..., :-1]), self.returned_values(v, inputs), head_mass)

    def _with_mass(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_with_null_key(q, k, v, self.scale, self.sink, with_mass=True)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return weights_beside_null_key(self.scores(q, k), self.sink)
