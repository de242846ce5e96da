"""Lazy Attention (arXiv 2601.00919): RoPE and a learnable distance bias, then Elastic-Softmax."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lazypipe.kernels import lazy_attention
from lazypipe.model.config import ModelConfig
from lazypipe.model.layers import Draw
from lazypipe.model.mixers.base import AttentionMixer, BlockInputs
from lazypipe.model.mixers.costs import QUERY_ROWS
from lazypipe.model.mixers.query_blocks import in_query_blocks, zero_share
from lazypipe.model.mixers.standard import visible
from lazypipe.model.packing import Documents, first_keys, visible_keys


class LazyAttention(AttentionMixer):
    """o_i = sum_j a_ij v_j with a_ij = max(softmax_j(s_ij) + tau / n_i, 0), n_i = i + 1,
    s_ij = q_i . k_j / sqrt(D) + bias[i - j], the bias up to distance W - 1.

    bias [H, W] and tau [H] stay float32 under autocast: at learning rate 1e-3 their updates vanish in bfloat16.
    `kernel` is the backend of `lazypipe.kernels.lazy_attention`.

    Ablations (fields of the configuration): without the bias; q and k unrotated; without Elastic-Softmax, tau = 0; one
    tau [1] for all heads; a constant threshold, max(softmax_j(s_ij) + tau, 0), for which there is no kernel: its rows
    are formed by torch, a block of queries at a time. What is ablated is None and no parameter.
    """

    # The bias [H, W] is a matrix in shape only: decay would pull every distance towards no preference.
    undecayed: ClassVar[tuple[str, ...]] = ("tau", "bias")
    own_rate: ClassVar[tuple[str, ...]] = ("tau", "bias")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.tau_init, self.bias_init_std = config.tau_init, config.bias_init_std
        self.rotates, self.relative = config.lazy_rope, config.lazy_threshold == "relative"
        biases = (config.num_heads, config.max_bias_length)
        self.bias = nn.Parameter(torch.empty(biases, dtype=torch.float32)) if config.lazy_bias else None
        taus = 1 if config.lazy_tau_scope == "layer" else config.num_heads
        self.tau = nn.Parameter(torch.empty(taus, dtype=torch.float32)) if config.lazy_elastic else None

    def initialise(self, draw: Draw) -> None:
        if self.bias is not None:
            draw.normal("bias", self.bias_init_std)
        if self.tau is not None:
            draw.constant("tau", self.tau_init)

    def tau_and_bias(self) -> tuple[Tensor | None, Tensor | None]:
        return self.tau, self.bias

    def queries_and_keys(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        return super().queries_and_keys(x, inputs) if self.rotates else self.unrotated(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._kernel(q, k, v, None) if self.relative else in_query_blocks(self.by_weights, q, k, v)

    def attend_documents(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        return self._kernel(q, k, v, documents) if self.relative else super().attend_documents(q, k, v, documents)

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        bias, tau = self.bias_and_tau(q)
        borders = None if documents is None else documents.cu_seqlens
        return lazy_attention(q, k, v, bias, tau, cu_seqlens=borders, scale=self.scale, backend=self.kernel)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        query_len, key_len = q.shape[2], k.shape[2]
        bias, tau = self.bias_and_tau(q)
        window = bias.shape[1]
        position = torch.arange(key_len - query_len, key_len, device=q.device)[:, None]
        distance = position - torch.arange(key_len, device=q.device)
        bias = bias[:, distance.clamp(0, window - 1)].masked_fill(distance >= window, 0.0)
        mask = visible(query_len, key_len, q.device)
        probs = torch.softmax((self.scores(q, k) + bias).masked_fill(~mask, -torch.inf), dim=-1)
        offset = tau[:, None, None] / (position + 1) if self.relative else tau[:, None, None]
        # A tau above zero would lift the future too, so the mask comes after the max.
        return torch.relu(probs + offset).masked_fill(~mask, 0.0)

    def sparsity(self, x: Tensor, inputs: BlockInputs) -> Tensor | None:
        if self.tau is None:
            return None
        if not self.relative:
            return zero_share(self.attention_rows(x, inputs, QUERY_ROWS), inputs.documents)
        return self.statistics(x, inputs)[0]

    def statistics(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor | None, Tensor | None]:
        """As everywhere; from one pass of the kernel, which hands out the log-sum-exp of each row for nothing."""
        if not self.relative:
            return super().statistics(x, inputs)
        documents, length = inputs.documents, x.shape[1]
        q, k = self.queries_and_keys(x, inputs)
        v = self.new_values(x)
        bias, tau = self.bias_and_tau(q)
        borders = None if documents is None else documents.cu_seqlens
        _, stats = lazy_attention(
            q, k, v, bias, tau, cu_seqlens=borders, scale=self.scale, backend=self.kernel, return_stats=True
        )
        pairs = visible_keys(length, documents, x.device)
        share = ((stats.row_sparsity * pairs).sum(-1) / pairs.sum()).mean(0)
        # a_i1 = max(exp(s_i1 - lse_i) + tau / n_i, 0): one product per query, and no row of weights.
        first = self.per_query_head(k)[:, :, first_keys(length, documents, x.device)].float()
        distance = pairs - 1
        near = bias[:, distance.clamp(max=bias.shape[1] - 1)].masked_fill(distance >= bias.shape[1], 0.0)
        scores = self.scale * (q.float() * first).sum(-1) + near
        mass = torch.relu(torch.exp(scores - stats.lse) + tau[:, None] / pairs).mean((0, -1))
        return None if self.tau is None else share, mass

    def bias_and_tau(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """(bias [H, W], tau [H]) as the kernel takes them: zeros for what is ablated, a shared tau for every head."""
        zeros = torch.zeros(self.num_heads, 1, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        bias = zeros if self.bias is None else self.bias
        return bias, zeros[:, 0] if self.tau is None else self.tau.expand(self.num_heads)
