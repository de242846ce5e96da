"""The final metrics of the stages that the report shows, each declared once: name, unit, meaning, how it is written.

From a declaration come its columns in tables/heads and tables/layers (sparsity), its final metric in the manifest and
in MLflow, its column of the report's comparison and of the table in the terminal, and its figure by layer. A metric of
attention weights is a declaration here and a function in stages/sparsity/metrics.py.

Imports no package beyond the standard library, so that the command line can show a stored report at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lazypipe.stages.formats import count, loss, perplexity, share, small, threshold


@dataclass(frozen=True)
class ByLayer:
    """A figure of a metric by layer: title, label and end of the y axis (None: above the data), text in its place."""

    title: str
    label: str
    caption: str
    top: float | None = None


@dataclass(frozen=True)
class Metric:
    """One final metric.

    name       in MLflow, tables and report.json; one that ends in "/" is a family, its members carry on with a number
    unit       "1" for a plain number or a share
    write      gives a value as text
    better     which end of the scale is better: the best of a column is bold
    heading    of its column in the report's comparison; "": no column there. {} stands for the number of a family
    short      the same in the terminal
    optional   a column only where some variant has a value
    by_layer   of attention weights: also a figure by layer, final metrics <name>/layer_<i>, and a column
               untrained_<name> in tables/heads and tables/layers
    untrained  the metric of attention weights whose value before training this is
    """

    name: str
    unit: str
    description: str
    write: Callable[[Any], str]
    better: Literal["lowest", "highest"] | None = None
    heading: str = ""
    short: str = ""
    optional: bool = False
    by_layer: ByLayer | None = None
    untrained: str = ""


EVALUATE: list[Metric] = []
ATTENTION: list[Metric] = []  # of attention weights
LEARNED: list[Metric] = []  # what else the sparsity stage measures of a model
PRETRAIN: list[Metric] = []


def declare(stage: list[Metric], metric: Metric) -> Metric:
    """Add a metric to those of a stage; columns of the report follow the order of declaration."""
    stage.append(metric)
    return metric


def reported() -> list[Metric]:
    """All metrics that are columns of the report, in its order."""
    return [metric for metric in (*EVALUATE, *ATTENTION, *LEARNED, *PRETRAIN) if metric.heading]


VALIDATION_LOSS = declare(
    EVALUATE,
    Metric(
        "validation_loss",
        "nats per token",
        "mean negative log-likelihood of held-out text at the trained context length",
        loss,
        better="lowest",
        heading="validation loss (nats)",
        short="val loss",
    ),
)
PERPLEXITY = declare(
    EVALUATE,
    Metric("perplexity", "1", "exp(validation loss)", perplexity, better="lowest", heading="perplexity", short="ppl"),
)
BITS_PER_BYTE = declare(
    EVALUATE,
    Metric(
        "bits_per_byte",
        "bits per byte",
        "held-out loss per byte of text, comparable across tokenizers",
        small,
        better="lowest",
        heading="bits per byte",
        short="bits/byte",
    ),
)
PERPLEXITY_AT = declare(
    EVALUATE,
    Metric(
        "perplexity_at/",
        "1",
        "perplexity at another context length",
        perplexity,
        better="lowest",
        heading="perplexity at {} †",
        short="ppl@{}",
    ),
)
SPARSITY = declare(
    ATTENTION,
    Metric(
        "sparsity",
        "1",
        "share of causal pairs whose attention weight is exactly 0",
        share,
        better="highest",
        heading="exact sparsity",
        short="sparsity",
        by_layer=ByLayer(
            title="Attention weights that are exactly 0",
            label="sparsity (share of causal pairs)",
            caption="Share of exactly-zero attention weights by layer",
            top=1.0,
        ),
    ),
)
UNTRAINED_SPARSITY = declare(
    ATTENTION,
    Metric(
        "untrained_sparsity",
        "1",
        "the sparsity of the same model with its initial weights",
        share,
        untrained="sparsity",
        heading="sparsity untrained",
        short="untrained",
    ),
)
NEAR_ZERO = declare(
    ATTENTION,
    Metric(
        "near_zero",
        "1",
        "share of causal pairs below a millionth of the uniform weight, exact zeros included",
        share,
        heading="near zero",
    ),
)
SURVIVING_MASS = declare(
    ATTENTION,
    Metric(
        "surviving_mass",
        "1",
        "sum of a query's weights, mean over queries; 1 for softmax",
        small,
        heading="surviving mass",
    ),
)
SINK = declare(
    ATTENTION,
    Metric(
        "sink",
        "1",
        "weight on the first token of the window, mean over queries",
        small,
        heading="sink",
        short="sink",
        by_layer=ByLayer(
            title="Attention on the first token",
            label="sink (mean weight)",
            caption="Attention on the first token by layer",
        ),
    ),
)
REST_MASS = declare(
    ATTENTION, Metric("rest_mass", "1", "the part of the surviving mass on all tokens but the first", small)
)
ZERO_MASS_ROWS = declare(
    ATTENTION, Metric("zero_mass_rows", "1", "share of queries whose weights are all exactly 0", share)
)
ENTROPY = declare(
    ATTENTION, Metric("entropy", "nats", "-sum A log A over the whole matrix; grows with the window", small)
)
ROW_ENTROPY = declare(ATTENTION, Metric("row_entropy", "nats", "mean entropy of the rows normalised to sum 1", small))
CONCENTRATION = declare(ATTENTION, Metric("concentration", "1", "Frobenius norm of the attention matrix", small))
TAU_MEAN = declare(LEARNED, Metric("tau_mean", "1", "mean of the learned thresholds", threshold))
TAU_MIN = declare(LEARNED, Metric("tau_min", "1", "lowest learned threshold", threshold))
TAU_MAX = declare(LEARNED, Metric("tau_max", "1", "highest learned threshold", threshold))
TAU_MOVED = declare(
    LEARNED, Metric("tau_moved", "1", "largest distance of a threshold from its initial value", threshold)
)
BIAS_MAX = declare(LEARNED, Metric("bias_max", "logits", "largest absolute distance bias", small))
BIAS_MOVED = declare(
    LEARNED, Metric("bias_moved", "logits", "largest distance of a bias from its initial value", small)
)
TOKENS_PER_S = declare(
    PRETRAIN,
    Metric(
        "tokens_per_s",
        "tokens per second",
        "training speed of the whole run",
        count,
        better="highest",
        heading="training tokens/s",
        short="tokens/s",
    ),
)
MFU = declare(
    PRETRAIN,
    Metric(
        "mfu",
        "1",
        "model FLOP utilisation: useful operations / peak of all GPUs",
        share,
        better="highest",
        heading="MFU",
        short="MFU",
        optional=True,
    ),
)
PEAK_MEMORY_GB = declare(
    PRETRAIN,
    Metric(
        "peak_memory_gb",
        "10^9 bytes",
        "most memory of a training worker",
        small,
        better="lowest",
        heading="training memory (GB)",
        optional=True,
    ),
)
TRAINING_LOSS = declare(
    PRETRAIN, Metric("loss", "nats per token", "training loss of the last step", loss, better="lowest")
)
TRAIN_SECONDS = declare(PRETRAIN, Metric("train_seconds", "s", "time in training steps", count, better="lowest"))
