"""Log-probabilities of given next tokens, without the logits of all positions at once."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_ONCE = 2**24  # 64 MiB in float32: at a vocabulary of 50,000, the logits of 335 positions


class LanguageModel(Protocol):
    """What scoring needs of a `Transformer`. hidden: tokens [B, L] -> [B, L, d], logits: its rows [N, d] -> [N, V]."""

    vocab_size: int

    def hidden(self, tokens: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class RowScores(NamedTuple):
    """Per predicted token, float32 [N]. hit: whether it is the likeliest; of n tokens that tie for it, each has 1 / n.

    choice_hit: the same among the choices only, None without choices.
    """

    log_prob: Tensor
    hit: Tensor
    choice_hit: Tensor | None


@torch.no_grad()
def token_losses(model: LanguageModel, windows: Tensor) -> Tensor:
    """Nats float32 [B, L] of predicting windows[:, 1:] from windows[:, :-1]; windows int64 [B, L + 1]."""
    rows = model.hidden(windows[:, :-1]).flatten(0, 1)
    targets = windows[:, 1:].flatten()
    size = max(1, LOGITS_AT_ONCE // model.vocab_size)
    losses = [
        F.cross_entropy(model.logits(rows[start : start + size]), targets[start : start + size], reduction="none")
        for start in range(0, len(rows), size)
    ]
    return torch.cat(losses).view(len(windows), -1)


@torch.no_grad()
def score_rows(model: LanguageModel, rows: Tensor, targets: Tensor, choices: Tensor | None = None) -> RowScores:
    """Score next tokens `targets` int64 [N] at `rows` [N, d] of `hidden`; choices int64 [N, C] hold the target each.

    A tie counts its share: a model that knows nothing scores exactly 1 / V, not by which token happens to come first.
    """
    size = max(1, LOGITS_AT_ONCE // model.vocab_size)
    found = []
    for start in range(0, len(rows), size):
        here = slice(start, start + size)
        logits, target = model.logits(rows[here]), targets[here, None]
        among = None if choices is None else _hit(logits.gather(1, choices[here]), logits.gather(1, target))
        of_target = logits.gather(1, target)
        log_prob = (of_target - logits.logsumexp(-1, keepdim=True))[:, 0]
        found.append(RowScores(log_prob, _hit(logits, of_target), among))
    choice_hits = [part.choice_hit for part in found if part.choice_hit is not None]
    return RowScores(
        torch.cat([part.log_prob for part in found]),
        torch.cat([part.hit for part in found]),
        torch.cat(choice_hits) if choice_hits else None,
    )


def _hit(logits: Tensor, of_target: Tensor) -> Tensor:
    """1 / n [N] where the target's logit [N, 1] is the highest of logits [N, C], with n that are as high; else 0."""
    ties = (logits == of_target).sum(-1)
    return (logits.amax(-1) == of_target[:, 0]).float() / ties
