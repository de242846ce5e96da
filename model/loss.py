"""The training objective, and what may be added to it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lazypipe.model.chunked_loss import Losses, losses_in_chunks, losses_of_logits
from lazypipe.model.costs import logits_chunk
from lazypipe.model.transformer import Transformer


def next_token_loss(
    model: Transformer,
    windows: Tensor,
    reduction: str = "mean",
    cu_seqlens: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy in nats, float32, of predicting windows[:, 1:] from windows[:, :-1]; windows int64 [B, L + 1].

    reduction: mean or sum over the B L predictions, or none for each of them [B L].
    cu_seqlens: int32 [N + 1], the documents that the B L inputs consist of, row after row (see `Transformer.forward`):
    each prediction is then made from its own document alone.
    chunk_tokens: predictions whose logits exist at a time (model/chunked_loss.py); None: all up to 256 MiB of logits.
    """
    return next_token_losses(model, windows, reduction, cu_seqlens, chunk_tokens).objective


def next_token_losses(
    model: Transformer,
    windows: Tensor,
    reduction: str = "mean",
    cu_seqlens: Tensor | None = None,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
    with_head_balance: bool = False,
) -> Losses:
    """`next_token_loss` with z_loss mean(log Z^2) added, Z = sum of exp(logits) (PaLM, arXiv 2204.02311, section 5).

    Log Z near 0 keeps logits from drifting off; PaLM's z_loss is 1e-4.
    with_head_balance: `head_balance` too, of a model with layers of `sink`.
    """
    inputs = windows[:, :-1] if cu_seqlens is None else windows[:, :-1].reshape(1, -1)
    targets = windows[:, 1:].flatten()
    if chunk_tokens is None:
        chunk_tokens = logits_chunk(len(targets), model.vocab_size)
    each_with_gradient = reduction == "none" and torch.is_grad_enabled()
    head_mass: Sequence[Tensor] = ()
    if with_head_balance:
        hidden, head_mass = model.hidden_and_head_mass(inputs, cu_seqlens)
    else:
        hidden = model.hidden(inputs, cu_seqlens=cu_seqlens)
    if chunk_tokens >= len(targets) or each_with_gradient:
        losses = losses_of_logits(model.logits(hidden).flatten(0, 1), targets, reduction, z_loss)
    else:
        losses = losses_in_chunks(hidden.flatten(0, 1), model.output_matrix, targets, chunk_tokens, reduction, z_loss)
    return losses._replace(head_balance=head_balance(head_mass)) if with_head_balance else losses


def head_balance(head_mass: Sequence[Tensor]) -> Tensor:
    """sum_l H CV(Imp_l)^2, [] float32, of Imp [H] of every layer of `sink`: 0 when its heads use their sinks alike.

    Imp_h = mean_t sigmoid(LSE_t - sink_h), LSE_t over the real keys of query t; CV = standard deviation (of all H, not
    of a sample) / mean. From "Attention Sink Forges Native MoE", as reported second-hand.
    """
    return torch.stack([len(mass) * mass.var(correction=0) / mass.mean().square() for mass in head_mass]).sum()
