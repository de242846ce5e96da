"""Metrics of attention weights, streamed over blocks of query rows.

A = the weights a layer really multiplies with V, [L, L] per head, causal. Rows of a lazy layer need not sum to 1, and
the first row of a window is exactly zero while tau <= -1: it counts as the zero row it is. A [heads, L, L] matrix never
exists; a model hands over blocks [B, H, rows, L] and every metric sees each row once:

    sums:    a block of rows -> sums      added over the blocks of a window, float64
    finish:  the window's sums -> value   one number per window and head

A new metric is a declaration in stages/metrics.py and a function here with `@measures` on it. Values are per window and
head, then averaged over windows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lazypipe.stages import metrics
from lazypipe.stages.metrics import Metric

NEAR_ZERO = 1e-6  # a weight below NEAR_ZERO / n_i is a millionth of the uniform weight


class Rows(NamedTuple):
    """A block of query rows of one layer, cut to the keys that its last row can see (K of them).

    weights      [B, H, rows, K] float64, exactly 0 where a key lies in the future
    causal       [rows, K] bool: the query may attend to the key
    token_count  [rows, 1] float64: n_i, the number of tokens query i may attend to
    """

    weights: Tensor
    causal: Tensor
    token_count: Tensor


Sums = tuple[Tensor | float, ...]


class Measure(NamedTuple):
    """How a metric is computed: the sums of a block of rows, and its value from those of a window."""

    sums: Callable[[Rows], Sums]
    finish: Callable[..., Tensor]


MEASURES: dict[str, Measure] = {}  # by the name of the metric


def quotient(numerator: Tensor, denominator: Tensor | float) -> Tensor:
    """A mean from its two sums (of counts, too: in float64); NaN where there was nothing to average."""
    return numerator.double() / denominator


def total(value: Tensor) -> Tensor:
    return value


def measures(
    metric: Metric, finish: Callable[..., Tensor] = quotient
) -> Callable[[Callable[[Rows], Sums]], Callable[[Rows], Sums]]:
    """Let the function below compute a declared metric. Each of its sums is [B, H] or a number."""

    def register(sums: Callable[[Rows], Sums]) -> Callable[[Rows], Sums]:
        MEASURES[metric.name] = Measure(sums, finish)
        return sums

    return register


@measures(metrics.SPARSITY)
def sparsity(rows: Rows) -> Sums:
    """Share of causal pairs with A_ij == 0 exactly."""
    return ((rows.weights == 0) & rows.causal).sum((-2, -1)), float(rows.causal.sum())


@measures(metrics.NEAR_ZERO)
def near_zero(rows: Rows) -> Sums:
    """Share of causal pairs with A_ij < 1e-6 / n_i, exact zeros included: what a dense softmax has instead of zeros."""
    small = rows.weights < NEAR_ZERO / rows.token_count
    return (small & rows.causal).sum((-2, -1)), float(rows.causal.sum())


@measures(metrics.SURVIVING_MASS)
def surviving_mass(rows: Rows) -> Sums:
    """Mean over queries of sum_j A_ij; 1 for softmax. It splits into `sink` and `rest_mass`."""
    return rows.weights.sum((-2, -1)), float(len(rows.causal))


@measures(metrics.SINK)
def sink(rows: Rows) -> Sums:
    """mean_i A_i1: the mass on the first token of the window (the sink score of "Deconstructing Attention")."""
    return rows.weights[..., 0].sum(-1), float(len(rows.causal))


@measures(metrics.REST_MASS)
def rest_mass(rows: Rows) -> Sums:
    """The part of the surviving mass that lies on all other tokens."""
    return rows.weights[..., 1:].sum((-2, -1)), float(len(rows.causal))


@measures(metrics.ZERO_MASS_ROWS)
def zero_mass_rows(rows: Rows) -> Sums:
    """Share of queries whose whole row is exactly zero."""
    return (rows.weights == 0).all(-1).sum(-1), float(len(rows.causal))


@measures(metrics.ENTROPY, finish=total)
def entropy(rows: Rows) -> Sums:
    """-sum A_ij log A_ij over the whole matrix, in nats: grows with L, an entropy only where rows sum to 1."""
    return (torch.special.entr(rows.weights).sum((-2, -1)),)


@measures(metrics.ROW_ENTROPY)
def row_entropy(rows: Rows) -> Sums:
    """Mean entropy of the rows normalised to sum 1, in nats; rows of zero mass are left out."""
    mass = rows.weights.sum(-1, keepdim=True)
    share = rows.weights / mass.masked_fill(mass == 0, 1.0)
    return torch.special.entr(share).sum((-2, -1)), (mass > 0).double().sum((-2, -1))


@measures(metrics.CONCENTRATION, finish=torch.sqrt)
def concentration(rows: Rows) -> Sums:
    """Frobenius norm of A."""
    return (rows.weights.square().sum((-2, -1)),)


def causal_rows(weights: Tensor, query_start: int) -> Rows:
    """The block [B, H, rows, L] whose first row is query `query_start` (0-based): float64, without its future keys."""
    query_end = query_start + weights.shape[2]
    query_at = torch.arange(query_start, query_end, device=weights.device)[:, None]
    key_at = torch.arange(query_end, device=weights.device)[None, :]
    return Rows(weights[..., :query_end].double(), key_at <= query_at, (query_at + 1).double())


def measure_windows(
    blocks: Iterable[tuple[int, int, Tensor]], layers: Sequence[int] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Every metric of a batch of B windows of L tokens, as float64 [layers, B, H].

    blocks: (layer, query_start, weights [B, H, rows, L]) as `Transformer.attention_rows` yields them, each row of each
    layer once. layers: the numbers of the layers that have weights, all from 0 on when None. NaN where a metric is not
    defined (the row entropy of a head without any mass).
    Raises ValueError when rows are missing or when weights are negative, infinite or NaN.
    """
    sums: dict[int, dict[str, Sums]] = {}
    rows_seen: dict[int, int] = {}
    length = 0
    for layer, query_start, weights in blocks:
        length = weights.shape[-1]
        rows = causal_rows(weights, query_start)
        if not bool(((rows.weights >= 0) & rows.weights.isfinite()).all()):
            raise ValueError(
                f"layer {layer} has attention weights that are negative or not finite (queries {query_start} to "
                f"{query_start + weights.shape[2] - 1}); attention weights are finite and at least 0"
            )
        layer_sums = sums.setdefault(layer, {})
        for name, measure in MEASURES.items():
            block_sums = measure.sums(rows)
            before = layer_sums.get(name, (0.0,) * len(block_sums))
            layer_sums[name] = tuple(old + new for old, new in zip(before, block_sums, strict=True))
        rows_seen[layer] = rows_seen.get(layer, 0) + weights.shape[2]
    missing = {layer: seen for layer, seen in rows_seen.items() if seen != length}
    expected = list(range(len(sums)) if layers is None else layers)
    if missing or sorted(sums) != expected or not sums:
        which = "0, 1, ..." if layers is None else f"of {expected}"
        raise ValueError(f"expected {length} query rows from each layer {which}; got {rows_seen} (layer: rows)")
    return {
        name: np.stack([measure.finish(*sums[layer][name]).double().cpu().numpy() for layer in expected])
        for name, measure in MEASURES.items()
    }


def average_windows(batches: Sequence[Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    """Mean over all windows of all batches, [layers, H] per metric, over the windows where the metric is defined."""
    averages = {}
    for name in batches[0]:
        values = np.concatenate([batch[name] for batch in batches], axis=1)
        defined = ~np.isnan(values)
        count = defined.sum(axis=1)
        averages[name] = np.where(count > 0, np.where(defined, values, 0.0).sum(axis=1) / np.maximum(count, 1), np.nan)
    return averages
