"""Loss, perplexity and bits per byte of held-out text at several context lengths, and without part of a hybrid.

A context length L cuts the validation tokens into windows that share no prediction: window w predicts tokens
w L + 1 ... w L + L, each from the tokens of its window before it. So the average prediction at L sees about L / 2
tokens, and curves over L say what longer context is worth. The headline numbers are those at the trained length.

A model trained with document_masking is scored with it: the tokens of the window before a prediction then count from
the last document border.

Bits per byte = nats / ln 2 / bytes of text of the predicted tokens, which end-of-document tokens add nothing to: a
number that models with different tokenizers can be compared by.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lazypipe.model.loss import next_token_loss
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Context, Interrupted
from lazypipe.stages.data.batches import document_borders, read_window, validation_windows
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.evaluate.ablation import ablated
from lazypipe.stages.evaluate.config import EvaluateConfig

TextBytes = npt.NDArray[np.float64]


class Score(NamedTuple):
    """Sums over the predictions of some windows. nats: negative log-likelihood. text_bytes: of the predicted tokens."""

    windows: int = 0
    tokens: int = 0
    nats: float = 0.0
    text_bytes: float = 0.0

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), held finite for a diverged model."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes


def measure(
    config: EvaluateConfig,
    model: Transformer,
    shards: TokenShards,
    bytes_of_token: TextBytes,
    eos_id: int | None,
    trained_length: int,
    context: Context,
) -> tuple[dict[str, float], int]:
    """Score config.extrapolation.context_lengths and the trained length, there also every one of config.ablations.

    Writes tables/context_lengths and, with ablations, tables/ablations. Returns the metrics and how many tokens the
    headline numbers are made from. bytes_of_token [V]: text behind each token id. eos_id: of a model trained with
    document_masking, else None. At most about config.batch_tokens tokens pass through the model at once.
    """
    asked = config.extrapolation.context_lengths
    lengths = [trained_length, *(length for length in asked if length != trained_length)]
    windows = {length: validation_windows(shards, length, max(1, config.max_tokens // length)) for length in lengths}
    total = sum(length * len(windows[length]) for length in [*lengths, *[trained_length] * len(config.ablations)])
    done = 0

    def score_windows(length: int) -> Score:
        nonlocal done
        score = Score()
        size = max(1, config.batch_tokens // length)
        for start in range(0, len(windows[length]), size):
            if context.stop_requested:
                raise Interrupted(f"evaluation stopped after {done} of {total} tokens; it starts again next time")
            context.progress(done, total, "tokens", context_length=length)
            batch = np.stack([read_window(shards, length, w) for w in windows[length][start : start + size]])
            score = add(score, score_batch(model, batch, bytes_of_token, eos_id))
            done += batch[:, 1:].size
        return score

    scores = {length: score_windows(length) for length in lengths}
    reduced: dict[str, Score] = {}
    for ablation in config.ablations:
        with ablated(model, ablation):
            reduced[ablation] = score_windows(trained_length)
    context.progress(total, total, "tokens")

    max_seq_len = model.config.max_seq_len
    rows = [row(length, scores[length], max_seq_len) for length in asked]
    context.log_table("context_lengths", rows)
    if reduced:
        rows = [{"ablation": name, **row(trained_length, score, max_seq_len)} for name, score in reduced.items()]
        context.log_table("ablations", rows)
    headline = scores[trained_length]
    metrics = {
        "validation_loss": headline.loss,
        "perplexity": headline.perplexity,
        "bits_per_byte": headline.bits_per_byte,
        **{f"perplexity_at/{length}": scores[length].perplexity for length in asked},
        **{f"validation_loss/{name}": score.loss for name, score in reduced.items()},
        **{f"perplexity/{name}": score.perplexity for name, score in reduced.items()},
    }
    return metrics, headline.tokens


@torch.no_grad()
def score_batch(
    model: Transformer, batch: npt.NDArray[np.int64], bytes_of_token: TextBytes, eos_id: int | None = None
) -> Score:
    """Score windows int64 [n, L + 1] in one forward pass; with eos_id, each prediction from its own document alone.

    Losses are added up in float64, so that how windows are batched changes nothing but rounding inside the model.
    """
    windows = torch.from_numpy(batch).to(model.embedding.weight.device)
    borders = None if eos_id is None else torch.from_numpy(document_borders(batch, eos_id))
    losses = next_token_loss(model, windows, "none", borders)
    text_bytes = float(bytes_of_token[batch[:, 1:]].sum())
    return Score(len(batch), losses.numel(), losses.double().sum().item(), text_bytes)


def add(one: Score, other: Score) -> Score:
    return Score(
        one.windows + other.windows,
        one.tokens + other.tokens,
        one.nats + other.nats,
        one.text_bytes + other.text_bytes,
    )


def row(length: int, score: Score, max_seq_len: int) -> dict[str, object]:
    """One row of tables/context_lengths."""
    return {
        "context_length": length,
        "extrapolation": length > max_seq_len,
        "windows": score.windows,
        "tokens": score.tokens,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
