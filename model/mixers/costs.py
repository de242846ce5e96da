"""What a mixer costs, from the model's configuration alone. Imports no torch. Rows of the registry refer to these.

Three questions about one layer's mixer: its parameters, the operations of a forward pass per token (counted as in
model/costs.py), and the bytes per token that the backward pass needs. Each has an answer for plain attention; a
mechanism with another one has a function of its own here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lazypipe.model.config import ModelConfig

QUERY_ROWS = 256  # queries at a time in query_blocks.py: 8 windows x 16 heads x 256 rows x 2048 keys are 268 MB float32

TAYLOR_CHUNK = 128  # tokens between two states of the linear form; 64 and 256 take 1.3 times as long (CPU, D = 64)
# All pairs cost L multiplications where the state costs one per feature. At D = 64 with 2145 features a training step
# takes equally long at about 2900 tokens (CPU; at 4096 the state is 1.4 times as fast, at 2048 0.7 times).
TAYLOR_STATE_FROM = 1.4


def kv_size(config: ModelConfig) -> int:
    """Width of the keys, and of the values, of all heads."""
    return config.kv_heads * config.head_dim


# Parameters


def attention_parameters(config: ModelConfig) -> int:
    """Four projections, and the norms of Q and K where configured."""
    projections = 2 * config.hidden_size * (config.hidden_size + kv_size(config))
    return projections + (2 * config.head_dim if config.qk_norm else 0)


def lazy_parameters(config: ModelConfig) -> int:
    biases = config.num_heads * config.max_bias_length if config.lazy_bias else 0
    thresholds = {"head": config.num_heads, "layer": 1}[config.lazy_tau_scope] if config.lazy_elastic else 0
    return attention_parameters(config) + biases + thresholds


def mlp_parameters(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.mlp_mixer_size


def sink_parameters(config: ModelConfig) -> int:
    return attention_parameters(config) + config.num_heads


def sigmoid_parameters(config: ModelConfig) -> int:
    return attention_parameters(config) + (config.num_heads if config.sigmoid_bias_learnable else 0)


# Operations of a forward pass, per token of windows of `seq_len` tokens


def projection_flops(config: ModelConfig) -> int:
    """The four projections."""
    return 4 * config.hidden_size * (config.hidden_size + kv_size(config))


def attention_flops(config: ModelConfig, seq_len: int) -> float:
    return projection_flops(config) + 4 * seq_len * config.hidden_size


def mlp_flops(config: ModelConfig, seq_len: int) -> float:  # noqa: ARG001
    return 6 * config.hidden_size * config.mlp_mixer_size


def gating_flops(config: ModelConfig, seq_len: int) -> float:  # noqa: ARG001
    """The scan multiplies no matrices."""
    return projection_flops(config)


def side_flops(config: ModelConfig, seq_len: int) -> float:
    """V and the way back, and weighted values; the maps are the side sequence's (model/costs.py)."""
    return 2 * config.hidden_size * (config.hidden_size + kv_size(config)) + 2 * seq_len * config.hidden_size


def swa_flops(config: ModelConfig, seq_len: int) -> float:
    keys = min(seq_len, config.swa_window + config.swa_sink_tokens)
    return projection_flops(config) + 4 * keys * config.hidden_size


def taylor_flops(config: ModelConfig, seq_len: int) -> float:
    """All pairs, or, where the linear form runs, what is read from and added to the state and pairs within a chunk."""
    features = taylor_features(config)
    if seq_len <= TAYLOR_STATE_FROM * features:
        return attention_flops(config, seq_len)
    state = 2 * features * (config.head_dim + 1) * (config.num_heads + config.kv_heads)
    chunk = 2 * min(TAYLOR_CHUNK, seq_len) * (2 * config.head_dim + 1) * config.num_heads
    return projection_flops(config) + state + chunk


def taylor_features(config: ModelConfig) -> int:
    """Features of a head: 1 + D + D (D + 1) / 2."""
    return 1 + config.head_dim + config.head_dim * (config.head_dim + 1) // 2


# Bytes of the backward pass, per token of a micro-batch. Pairs (float32, bfloat16), indexed by `half`. Counted with
# torch.autograd.graph.saved_tensors_hooks; tests/model/test_costs.py repeats it.

ByDtype = tuple[int, int]

ATTENTION: ByDtype = (17, 11)  # per unit of hidden size
QK_NORM: ByDtype = (21, 19)  # the norms' inputs and outputs; in bfloat16 torch has no fused RMSNorm of float32 weights
NO_PAIRS: ByDtype = (0, 0)
CONSTANT_LAZY_PAIRS: ByDtype = (14, 14)


class SavedBytes(NamedTuple):
    """Bytes per token. kept: for the backward pass. passing: of the one block of queries that exists at a time."""

    kept: float
    passing: float = 0


def attention_bytes(
    config: ModelConfig,
    seq_len: int,
    rows: int,  # noqa: ARG001
    half: bool,
    *,
    per_hidden: ByDtype = ATTENTION,
    per_pair: ByDtype = NO_PAIRS,
    in_query_blocks: bool = False,
) -> SavedBytes:
    """rows: of the micro-batch, the side sequence included. half: computes in bfloat16.

    per_hidden: bytes per unit of hidden size. per_pair: bytes per head and pair of positions; with in_query_blocks
    those of QUERY_ROWS queries, which exist one block at a time as soon as there are several.
    """
    own: float = per_hidden[half] * config.hidden_size + 4 * config.num_heads
    if config.qk_norm:
        own += QK_NORM[half] * config.hidden_size
    if in_query_blocks and seq_len > QUERY_ROWS:
        return SavedBytes(own, 2 * per_pair[half] * config.num_heads * QUERY_ROWS)
    return SavedBytes(own + per_pair[half] * config.num_heads * seq_len)


def lazy_bytes(config: ModelConfig, seq_len: int, rows: int, half: bool) -> SavedBytes:
    """The constant threshold has no kernel and forms its weights."""
    if config.lazy_threshold == "relative":
        return attention_bytes(config, seq_len, rows, half)
    return attention_bytes(config, seq_len, rows, half, per_pair=CONSTANT_LAZY_PAIRS, in_query_blocks=True)


def mlp_bytes(config: ModelConfig, seq_len: int, rows: int, half: bool) -> SavedBytes:  # noqa: ARG001
    return SavedBytes(4 * (2 if half else 4) * config.mlp_mixer_size)


def side_bytes(config: ModelConfig, seq_len: int, rows: int, half: bool) -> SavedBytes:
    """One map serves all rows, and only the side sequence's queries and keys are normed."""
    own: float = (19, 13)[half] * config.hidden_size + 4 * config.num_heads
    if config.qk_norm:
        own += QK_NORM[half] * config.hidden_size / rows
    return SavedBytes(own + (9, 14)[half] * config.num_heads * seq_len / rows)


def taylor_bytes(config: ModelConfig, seq_len: int, rows: int, half: bool) -> SavedBytes:
    """All pairs, or the states kept where the linear form runs."""
    features = taylor_features(config)
    if seq_len <= TAYLOR_STATE_FROM * features:
        return attention_bytes(config, seq_len, rows, half, per_hidden=(21, 26), per_pair=(13, 13))
    states = 4 * config.kv_heads * features * (config.head_dim + 1) / TAYLOR_CHUNK
    return SavedBytes(attention_bytes(config, seq_len, rows, half, per_hidden=(21, 26)).kept + states)
