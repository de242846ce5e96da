"""The training objective, and what may be added to it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.transformer import Transformer


def next_token_loss(
    model: Transformer,
    windows: Tensor,
    reduction: str = "mean",
    cu_seqlens: Tensor | None = None,
    head_mass: list[Tensor] | None = None,
) -> Tensor:
    """Cross-entropy in nats, float32, of predicting windows[:, 1:] from windows[:, :-1]; windows int64 [B, L + 1].

    reduction: mean or sum over the B L predictions, or none for each of them [B L].
    cu_seqlens: int32 [N + 1], the documents that the B L inputs consist of, row after row (see `Transformer.forward`):
    each prediction is then made from its own document alone.
    head_mass: as in `Transformer.forward`.
    """
    inputs = windows[:, :-1] if cu_seqlens is None else windows[:, :-1].reshape(1, -1)
    logits = model(inputs, cu_seqlens=cu_seqlens, head_mass=head_mass)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


def head_balance(head_mass: Sequence[Tensor]) -> Tensor:
    """sum_l H CV(Imp_l)^2, [] float32, of Imp [H] of every layer of `sink`: 0 when its heads use their sinks alike.

    Imp_h = mean_t sigmoid(LSE_t - sink_h), LSE_t over the real keys of query t; CV = standard deviation (of all H, not
    of a sample) / mean. From "Attention Sink Forges Native MoE", as reported second-hand.
    """
    return torch.stack([len(mass) * mass.var(correction=0) / mass.mean().square() for mass in head_mass]).sum()
