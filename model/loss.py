"""The training objective."""

import torch.nn.functional as F
from torch import Tensor

from model.transformer import Transformer


def next_token_loss(
    model: Transformer, windows: Tensor, reduction: str = "mean", cu_seqlens: Tensor | None = None
) -> Tensor:
    """Cross-entropy in nats, float32, of predicting windows[:, 1:] from windows[:, :-1]; windows int64 [B, L + 1].

    reduction: mean or sum over the B L predictions, or none for each of them [B L].
    cu_seqlens: int32 [N + 1], the documents that the B L inputs consist of, row after row (see `Transformer.forward`):
    each prediction is then made from its own document alone.
    """
    if cu_seqlens is None:
        logits = model(windows[:, :-1])
    else:
        logits = model(windows[:, :-1].reshape(1, -1), cu_seqlens=cu_seqlens)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)
