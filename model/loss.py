"""The training objective, what may be added to it, and its logits a few tokens at a time.

Logits of N tokens over V entries are 4 N V bytes, their log-softmax and gradient as many each: 3.3 GB three times for
N = 8 x 2048 and V = 50,304, more than a 340M model and its optimizer take. But the gradient of a token's loss needs
its own logits alone, so each chunk's is formed at once, multiplied into the gradients of hidden states [N, d] and
matrix [V, d], and dropped. Nothing is computed twice: chunks cost no operations.

`torch.nn.functional.linear_cross_entropy` does the same for the plain loss (the tests compare results,
`lazypipe bench loss` times). This one has the z-loss, follows autocast, and sums the matrix's gradient in
float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lazypipe.model.costs import logits_chunk
from lazypipe.model.transformer import Transformer


class Losses(NamedTuple):
    """objective = cross_entropy + z_loss * log_z_squared, with gradient; the two parts are for the record, without.

    cross_entropy  -log p_target in nats; log_z_squared  logsumexp(logits)^2, 0 without z_loss: each the mean or sum of
    N tokens, or [N].
    head_balance   [], with gradient, where it was asked for (`model.loss.next_token_losses`); no part of the objective.
    """

    objective: Tensor
    cross_entropy: Tensor
    log_z_squared: Tensor
    head_balance: Tensor | None = None


def losses_of_logits(logits: Tensor, targets: Tensor, reduction: str = "mean", z_loss: float = 0.0) -> Losses:
    """The same of logits [N, V] that are at hand."""
    cross_entropy = F.cross_entropy(logits, targets, reduction=reduction)
    if not z_loss:
        return Losses(cross_entropy, cross_entropy.detach(), torch.zeros_like(cross_entropy))
    squares = _reduced(torch.logsumexp(logits, dim=-1).square(), reduction)
    return Losses(cross_entropy + z_loss * squares, cross_entropy.detach(), squares.detach())


def losses_in_chunks(
    hidden: Tensor, matrix: Tensor, targets: Tensor, chunk_tokens: int, reduction: str = "mean", z_loss: float = 0.0
) -> Losses:
    """Losses of logits = hidden matrix^T, `chunk_tokens` rows of them at a time; at least float32.

    hidden [N, d], matrix [V, d] (any float dtypes; the product is in autocast's, where that is on), targets int64 [N].
    reduction: mean or sum; none as well where no gradient is asked for (ValueError otherwise).
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(hidden.dtype, matrix.dtype)
    if torch.is_grad_enabled() and (hidden.requires_grad or matrix.requires_grad):
        if reduction == "none":
            raise ValueError("reduction is 'none' and a gradient is asked for; expected mean or sum, or no_grad")
        scale = 1.0 / len(targets) if reduction == "mean" else 1.0
        apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _ChunkedLoss.apply
        return Losses(*apply(hidden, matrix, targets, chunk_tokens, scale, z_loss, dtype))
    with torch.autocast(device, enabled=False):
        matrix = matrix.to(dtype)
        parts = [
            _rows(h.to(dtype), matrix, t)[:2]
            for h, t in zip(torch.split(hidden, chunk_tokens), torch.split(targets, chunk_tokens), strict=True)
        ]
    rows, log_z = (torch.cat(part) for part in zip(*parts, strict=True))
    cross_entropy, squares = _reduced(rows, reduction), _reduced(log_z.square() * bool(z_loss), reduction)
    return Losses(cross_entropy + z_loss * squares, cross_entropy, squares)


class _ChunkedLoss(torch.autograd.Function):
    """Losses of `scale` times the sum over all tokens; the gradients are made in the forward pass.

    d objective / d logits = scale (p (1 + 2 z_loss log Z) - [target])
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        scale: float,
        z_loss: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        accumulated = torch.promote_types(matrix.dtype, torch.float32)
        grad_hidden, grad_matrix = torch.empty_like(hidden), torch.zeros_like(matrix, dtype=accumulated)
        cross_entropy, squares = torch.zeros(2, dtype=accumulated, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            operand = matrix.to(dtype)
            for start in range(0, len(targets), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                h, t = hidden[rows].to(dtype), targets[rows]
                loss, log_z, log_probs = _rows(h, operand, t)
                cross_entropy += loss.sum()
                gradient = log_probs.exp_()
                if z_loss:
                    squares += log_z.square().sum()
                    gradient *= 1 + 2 * z_loss * log_z[:, None]
                gradient[torch.arange(len(t), device=t.device), t] -= 1
                gradient = gradient.mul_(scale).to(dtype)
                grad_hidden[rows] = gradient @ operand
                if dtype == accumulated:
                    grad_matrix.addmm_(gradient.T, h)
                else:
                    grad_matrix += gradient.T @ h
        ctx.save_for_backward(grad_hidden, grad_matrix.to(matrix.dtype))
        cross_entropy, squares = scale * cross_entropy, scale * squares
        ctx.mark_non_differentiable(cross_entropy, squares)
        return cross_entropy + z_loss * squares, cross_entropy, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_matrix = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_matrix, None, None, None, None, None


def _rows(hidden: Tensor, matrix: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [n], log Z [n], log-probabilities [n, V]) of one chunk, at least float32."""
    logits = F.linear(hidden, matrix)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = F.log_softmax(logits, dim=-1)
    at_target = log_probs.gather(1, targets[:, None])[:, 0]
    return -at_target, logits.gather(1, targets[:, None])[:, 0] - at_target, log_probs


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


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
    chunk_tokens: predictions whose logits exist at a time ; None: all up to 256 MiB of logits.
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
