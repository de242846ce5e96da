"""Perplexity by context length and by position: what longer context is worth, and where a model stops to follow.

All lengths score the same predictions, the first `same_tokens` of the validation split: windows of L tokens stand side
by side, the last one reaches back so that it ends with the text and scores only what the one before has not. So every
prediction is scored exactly once at every length, and lengths can be compared token by token. Sliding windows move by a
stride s < L and score their last s predictions (the first window all): each has at least L - s tokens of context, at
L / s times the cost. With s = L the two are the same.

The position of a prediction is the number of tokens it is made from, 1 ... L. The buckets of positions end at powers of
two and at the trained length, so that none holds positions on both sides of it.

perplexity.py measures the same lengths over windows that are spread over the split: the numbers to quote for a length,
as they are of the whole split and, with document_masking, within documents; there each length drops a remainder of its
own, so that two lengths are not compared over the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lazypipe.model.scoring import LanguageModel, token_losses
from lazypipe.stages.contract import Context, Interrupted
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.evaluate.config import ExtrapolationConfig
from lazypipe.stages.figures import by_length
from lazypipe.stages.figures.listed import EXTRAPOLATION

Row = dict[str, Any]
Sums = npt.NDArray[np.float64]


class Window(NamedTuple):
    """tokens[start : start + L + 1]; its predictions from position first_scored (1 ... L) on are scored here."""

    start: int
    first_scored: int


def measure(
    config: ExtrapolationConfig,
    same_tokens: int,
    model: LanguageModel,
    shards: TokenShards,
    trained_length: int,
    batch_tokens: int,
    device: torch.device,
    context: Context,
) -> dict[str, float]:
    """Score the first `same_tokens` predictions, at least those of the longest window, at every length.

    Writes tables/extrapolation, tables/positions and figures/extrapolation. Returns extrapolation/<length>, the
    perplexity, and extrapolation_sliding/<length> with a stride.
    At most about `batch_tokens` tokens pass through the model at once, and the logits of 64 MiB exist at a time.
    """
    predictions = min(shards.num_tokens - 1, max(same_tokens, *config.context_lengths))
    plans = []
    for length in config.context_lengths:
        plans.append((length, length))
        if config.stride is not None and config.stride < length:
            plans.append((length, config.stride))
    total = sum(length * len(windows(predictions, length, stride)) for length, stride in plans)
    rows: list[Row] = []
    positions: list[Row] = []
    done = 0
    for length, stride in plans:
        sums = np.zeros((3, length))
        for batch in batches(windows(predictions, length, stride), max(1, batch_tokens // length)):
            if context.stop_requested:
                raise Interrupted(f"evaluation stopped after {done} of {total} tokens; it starts again next time")
            context.progress(done, total, "tokens", length=length, stride=stride)
            sums += score(model, shards, batch, length, device)
            done += length * len(batch)
        rows.append(
            {
                "context_length": length,
                "stride": stride,
                "extrapolation": length > trained_length,
                **averages(sums),
            }
        )
        if stride == length:
            last = bucket_ends(config, length, trained_length)
            for first, end in zip([1, *(one + 1 for one in last)], last, strict=False):
                bucket = {"context_length": length, "first_position": first, "last_position": end}
                positions.append({**bucket, **averages(sums[:, first - 1 : end])})
    context.progress(total, total, "tokens")
    context.log_table("extrapolation", rows)
    context.log_table("positions", positions)
    context.log_figure(EXTRAPOLATION.name, by_length.extrapolation({"": (rows, positions)}, trained_length))
    return {
        f"extrapolation{'' if row['stride'] == row['context_length'] else '_sliding'}/{row['context_length']}": row[
            "perplexity"
        ]
        for row in rows
    }


def windows(predictions: int, length: int, stride: int) -> list[Window]:
    """Windows of `length` that score each of `predictions` >= length next tokens once, `stride` <= length apart."""
    placed = [Window(0, 1)]
    scored = length
    while scored < predictions:
        scored_next = min(scored + stride, predictions)
        start = scored_next - length
        placed.append(Window(start, scored - start + 1))
        scored = scored_next
    return placed


def batches(all_windows: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    for start in range(0, len(all_windows), size):
        yield all_windows[start : start + size]


def score(
    model: LanguageModel, shards: TokenShards, batch: Sequence[Window], length: int, device: torch.device
) -> Sums:
    """[3, length] float64: number of scored predictions at each position, sum of their nats, sum of squared nats."""
    tokens = np.stack([shards.read(window.start, length + 1) for window in batch])
    losses = token_losses(model, torch.from_numpy(tokens).to(device)).double().cpu().numpy()
    first = np.array([window.first_scored for window in batch])
    counted = np.arange(1, length + 1) >= first[:, None]
    kept = np.where(counted, losses, 0.0)
    return np.stack([counted.sum(0), kept.sum(0), np.square(kept).sum(0)]).astype(np.float64)


def averages(sums: Sums) -> Row:
    """tokens, loss (nats), its standard error as if predictions were independent (None for one), and perplexity."""
    tokens, nats, squares = (float(value) for value in sums.sum(1))
    if tokens == 0:
        return {"tokens": 0, "loss": None, "loss_error": None, "perplexity": None}
    loss = nats / tokens
    variance = max(0.0, squares / tokens - loss**2)
    error = math.sqrt(variance / (tokens - 1)) if tokens > 1 else None
    return {"tokens": int(tokens), "loss": loss, "loss_error": error, "perplexity": math.exp(min(loss, 700.0))}


def bucket_ends(config: ExtrapolationConfig, length: int, trained_length: int) -> list[int]:
    """Last positions of the buckets of 1 ... length, the last of them `length`."""
    ends = config.position_buckets or (*(2**power for power in range(length.bit_length())), trained_length)
    return sorted({end for end in ends if end < length} | {length})
