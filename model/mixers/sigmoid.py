"""Sigmoid attention (Ramapuram et al. 2024, arXiv 2409.04431): every weight on its own, nothing normalised."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from lazypipe.model.config import ModelConfig
from lazypipe.model.layers import Draw
from lazypipe.model.mixers.query_blocks import RowwiseAttention
from lazypipe.model.mixers.standard import visible


class SigmoidAttention(RowwiseAttention):
    """o_i = sum_{j <= i} sigma(s_ij + b) v_j, b = -log(max_seq_len) unless config.sigmoid_bias says otherwise.

    That b makes a row of flat scores over max_seq_len keys sum to about 1. With config.sigmoid_bias_learnable there is
    one b per head, logit_bias [H] float32, which starts there.
    """

    undecayed: ClassVar[tuple[str, ...]] = ("logit_bias",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.initial_bias = -math.log(config.max_seq_len) if config.sigmoid_bias is None else config.sigmoid_bias
        self.logit_bias = (
            nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32)) if config.sigmoid_bias_learnable else None
        )

    def initialise(self, draw: Draw) -> None:
        if self.logit_bias is not None:
            draw.constant("logit_bias", self.initial_bias)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        bias = self.initial_bias if self.logit_bias is None else self.logit_bias[:, None, None]
        mask = visible(q.shape[2], k.shape[2], q.device)
        return torch.sigmoid(self.scores(q, k) + bias).masked_fill(~mask, 0.0)
