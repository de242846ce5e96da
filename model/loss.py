"""The training objective."""

import torch.nn.functional as F
from torch import Tensor

from model.transformer import Transformer


def next_token_loss(model: Transformer, windows: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, float32, of predicting windows[:, 1:] from windows[:, :-1]; windows int64 [B, L + 1].

    reduction: mean or sum over the B L predictions.
    """
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)
