"""What a model costs, from its configuration alone: floating-point operations and memory of training. Imports no torch.

Operations are those of matrix products, a multiplication and an addition each, as Kaplan et al. 2020 (arXiv 2001.08361,
table 1) and PaLM (arXiv 2204.02311, appendix B) count them. A token's forward pass through a weight matrix of n entries
takes 2 n; scores and weighted values of all-pairs attention take 4 T d over T keys (d = heads x head width), masked
pairs included as there. The backward pass takes twice the forward. Lookups, norms, RoPE, softmax and scans count
nothing, nor does what an implementation computes twice (checkpointed blocks, the second pass of a fused kernel).

    standard and its relatives   4 projections, 4 T d
    swa                          4 projections, 4 min(T, window + sink tokens) d
    mlp                          3 projections, no pairs
    taylor                       4 projections; 4 T d, or from 1.4 times as many tokens as features on the linear form:
                                 4 C d within a chunk of C tokens, 2 F (D + 1) per head to read and to extend the state
    gating                       4 projections; its scan multiplies no matrices
    random_qk, text_qk           2 projections (V and out) and 2 T d per row of the batch; once per micro-batch the
                                 map, 2 T d, and the side sequence's own way through the layers below
    all                          6 d m for the MLP of width m, 2 d V for the logits over V tokens
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from lazypipe.model.config import ModelConfig, parameter_count
from lazypipe.model.mixers.costs import kv_size
from lazypipe.model.mixers.registry import mechanism

# Float32 logits up to this size are formed at once, larger ones in chunks of half of it (model/loss.py), about
# 0.4 GB with a chunk's passing copies. `lazypipe bench loss` times both.
FULL_LOGITS_BYTES = 2**28


def logits_chunk(num_tokens: int, vocab_size: int) -> int:
    """Predictions whose logits exist at a time, when nobody says: all up to FULL_LOGITS_BYTES."""
    if 4 * num_tokens * vocab_size <= FULL_LOGITS_BYTES:
        return num_tokens
    return max(1, FULL_LOGITS_BYTES // (8 * vocab_size))


def non_embedding_parameters(config: ModelConfig) -> int:
    """Parameters outside the input and output embeddings."""
    return parameter_count(config, 0)


def training_flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int, micro_batch_size: int) -> float:
    """Operations per token of training windows of `seq_len` tokens: forward and backward, see the module docstring.

    micro_batch_size: the rows that share one pass of the side sequence; it matters to random_qk and text_qk only.
    """
    return 3 * forward_flops_per_token(config, vocab_size, seq_len, micro_batch_size)


def forward_flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int, micro_batch_size: int) -> float:
    hidden = config.hidden_size
    mlp = 6 * hidden * config.mlp_size
    total: float = 2 * hidden * vocab_size + config.num_layers * mlp
    for name in config.layer_mixers:
        total += mechanism(name).flops(config, seq_len)
    if config.mechanism.side_sequence is not None:
        total += _side_flops(config, seq_len, mlp) / micro_batch_size
    return total


def _side_flops(config: ModelConfig, seq_len: int, mlp: int) -> float:
    """Forward operations per position of the side sequence, up to the queries and keys of the last layer that reads it,
    and per row of the maps that all rows of the batch share."""
    hidden = config.hidden_size
    queries_and_keys, each_map = 2 * hidden * (hidden + kv_size(config)), 2 * seq_len * hidden
    rows = [mechanism(name) for name in config.layer_mixers]
    readers = [layer for layer, row in enumerate(rows) if row.side_sequence is not None]
    total: float = len(readers) * (queries_and_keys + each_map)
    for layer, row in enumerate(rows[: readers[-1]]):
        total += mlp + row.flops(config, seq_len)
        total += each_map if layer in readers else 0
    return total


class Memory(NamedTuple):
    """Bytes of a training worker. Upper estimates; what the libraries and the device keep for themselves comes on top.

    weights      float32, and under bfloat16 the copies autocast keeps
    gradients    float32; a second time while several workers sum theirs
    optimizer    the two moments of AdamW
    activations  what the backward pass needs of one micro-batch, and one layer's worth again for what exists meanwhile
    logits       of one micro-batch: logits, their log-softmax and gradient; in chunks, those of one chunk and the
                 finished gradients of the output matrix and of what it is applied to
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(self)


def training_memory(
    config: ModelConfig,
    vocab_size: int,
    seq_len: int,
    micro_batch_size: int,
    dtype: Literal["float32", "bfloat16"],
    workers: int = 1,
    loss_chunk_tokens: int | None = None,
    activation_checkpointing: Literal["none", "block", "selective"] = "none",
) -> Memory:
    """Memory of one data-parallel worker, which holds the whole model."""
    predictions = micro_batch_size * seq_len
    chunk = min(predictions, loss_chunk_tokens or logits_chunk(predictions, vocab_size))
    finished = 0 if chunk == predictions else 8 * config.hidden_size * (vocab_size + predictions)
    half = dtype == "bfloat16"
    parameters = parameter_count(config, vocab_size)
    rows = micro_batch_size + (0 if config.mechanism.side_sequence is None else 1)
    mixers = [mechanism(name).saved_bytes(config, seq_len, rows, half) for name in config.layer_mixers]
    layers = [_block_bytes(config, half) + mixer.kept for mixer in mixers]
    passing = max(mixer.passing for mixer in mixers)
    kept = sum(layers)
    if activation_checkpointing != "none":  # beside what is kept, one block in full at a time
        each = _checkpointed_bytes(config, half, activation_checkpointing == "selective")
        kept = sum(min(layer, each) for layer in layers) + max(layers)
    tokens = rows * seq_len
    return Memory(
        weights=parameters * (6 if half else 4),
        gradients=parameters * 4 * (1 if workers == 1 else 2),
        optimizer=parameters * 8,
        activations=round(tokens * (kept + max(layers) + passing + 16 * config.hidden_size)),
        logits=chunk * vocab_size * (16 if half else 12) + finished,
    )


def _block_bytes(config: ModelConfig, half: bool) -> float:
    """Bytes per token that a block keeps for its backward pass beside its mixer's."""
    # Two norms with float32 inputs, their outputs, the MLP's gate, its SiLU, up and product.
    return 24 * config.hidden_size + 8 + 4 * (2 if half else 4) * config.mlp_size


def _checkpointed_bytes(config: ModelConfig, half: bool, selective: bool) -> float:
    """Bytes per token of a checkpointed layer: its input and, where the mixer reads them, the values of the layer
    below; if selective, the outputs of its matrix products and of its attention too."""
    number = 2 if half else 4
    kept: float = 4 * config.hidden_size + (number * kv_size(config) if config.mechanism.reads_values else 0)
    if selective:
        mixer = max(3 * config.hidden_size + 2 * kv_size(config), 2 * config.mlp_mixer_size + config.hidden_size)
        kept += number * (mixer + 2 * config.mlp_size + config.hidden_size) + 4 * config.num_heads
    return kept
