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

from lazypipe.model.config import WITH_SIDE_SEQUENCE, AnyMixer, ModelConfig, parameter_count

# Sizes the mixers work in; here, where they can be read without torch.
QUERY_ROWS = 256  # queries of a block; 8 windows x 16 heads x 256 rows x 2048 keys are 268 MB of float32
TAYLOR_CHUNK = 128  # tokens between two states of the linear form; 64 and 256 take 1.3 times as long (CPU, D = 64)
# All pairs cost L multiplications where the state costs one per feature. At D = 64 with 2145 features a training step
# takes equally long at about 2900 tokens (CPU; at 4096 the state is 1.4 times as fast, at 2048 0.7 times).
TAYLOR_STATE_FROM = 1.4
CONSTANT_LAZY = "lazy, constant threshold"  # the ablation without a kernel
IN_QUERY_BLOCKS = frozenset({CONSTANT_LAZY, "sigmoid", "entmax", "stick_breaking", "alibi", "swa"})

# Float32 logits up to this size are formed at once, larger ones in chunks of half of it (model/chunked_loss.py), about
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
    for mixer in config.layer_mixers:
        total += _mixer_flops(config, mixer, seq_len)
    if config.mixer in WITH_SIDE_SEQUENCE:
        total += _side_flops(config, seq_len, mlp) / micro_batch_size
    return total


def _mixer_flops(config: ModelConfig, mixer: AnyMixer, seq_len: int) -> float:
    """Forward operations per token of one layer's mixer."""
    hidden, kv_size = config.hidden_size, config.kv_heads * config.head_dim
    projections = 4 * hidden * (hidden + kv_size)
    match mixer:
        case "mlp":
            return 6 * hidden * config.mlp_mixer_size
        case "gating":
            return projections
        case "random_qk" | "text_qk":
            return 2 * hidden * (hidden + kv_size) + 2 * seq_len * hidden
        case "swa":
            return projections + 4 * min(seq_len, config.swa_window + config.swa_sink_tokens) * hidden
        case "taylor" if seq_len > TAYLOR_STATE_FROM * (features := _taylor_features(config)):
            state = 2 * features * (config.head_dim + 1) * (config.num_heads + config.kv_heads)
            chunk = 2 * min(TAYLOR_CHUNK, seq_len) * (2 * config.head_dim + 1) * config.num_heads
            return projections + state + chunk
        case _:
            return projections + 4 * seq_len * hidden


def _side_flops(config: ModelConfig, seq_len: int, mlp: int) -> float:
    """Forward operations per position of the side sequence, up to the queries and keys of the last layer that reads it,
    and per row of the maps that all rows of the batch share."""
    hidden, kv_size = config.hidden_size, config.kv_heads * config.head_dim
    queries_and_keys, each_map = 2 * hidden * (hidden + kv_size), 2 * seq_len * hidden
    readers = [layer for layer, mixer in enumerate(config.layer_mixers) if mixer in WITH_SIDE_SEQUENCE]
    total: float = len(readers) * (queries_and_keys + each_map)
    for layer, mixer in enumerate(config.layer_mixers[: readers[-1]]):
        total += mlp + _mixer_flops(config, mixer, seq_len)
        total += each_map if layer in readers else 0
    return total


def _taylor_features(config: ModelConfig) -> int:
    return 1 + config.head_dim + config.head_dim * (config.head_dim + 1) // 2


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
    rows = micro_batch_size + (1 if config.mixer in WITH_SIDE_SEQUENCE else 0)
    kinds = [_kind(config, mixer) for mixer in config.layer_mixers]
    layers = [_saved_bytes(config, kind, seq_len, rows, half) for kind in kinds]
    block = max(_block_bytes(config, kind, seq_len, half) for kind in kinds)
    kept = sum(layers)
    if activation_checkpointing != "none":  # beside what is kept, one block in full at a time
        each = _checkpointed_bytes(config, half, activation_checkpointing == "selective")
        kept = sum(min(layer, each) for layer in layers) + max(layers)
    tokens = rows * seq_len
    return Memory(
        weights=parameters * (6 if half else 4),
        gradients=parameters * 4 * (1 if workers == 1 else 2),
        optimizer=parameters * 8,
        activations=round(tokens * (kept + max(layers) + block + 16 * config.hidden_size)),
        logits=chunk * vocab_size * (16 if half else 12) + finished,
    )


# Bytes that the backward pass keeps per token and unit of hidden size beyond the block's own 24, (float32, bfloat16),
# counted with torch.autograd.graph.saved_tensors_hooks; tests/model/test_costs.py repeats it.
ATTENTION = (17, 11)
BEYOND_ATTENTION: dict[str, tuple[int, int]] = {
    "taylor": (21, 26),
    "gating": (28, 28),
    "random_qk": (19, 13),
    "text_qk": (19, 13),
    "static_qk": (25, 16),
    "softmax1": (22, 14),
    "sink": (31, 18),
    "elliptical": (21, 16),
    "swa": (21, 14),
}
QK_NORM = (21, 19)  # the norms' inputs and outputs; in bfloat16 torch has no fused RMSNorm with float32 weights
# Bytes per head and pair of positions: of all pairs for taylor and the maps of the side sequence; the others work on
# blocks of queries, of which one exists at a time as soon as there are several.
PAIRS: dict[str, tuple[int, int]] = {
    CONSTANT_LAZY: (14, 14),
    "taylor": (13, 13),
    "random_qk": (9, 14),
    "text_qk": (9, 14),
    "sigmoid": (9, 7),
    "entmax": (29, 27),
    "stick_breaking": (25, 23),
    "alibi": (2, 2),
    "swa": (1, 1),
}


def _kind(config: ModelConfig, mixer: AnyMixer) -> str:
    """The mixer, or the ablation of it that computes in another way."""
    return CONSTANT_LAZY if mixer == "lazy" and config.lazy_threshold == "constant" else mixer


def _saved_bytes(config: ModelConfig, mixer: str, seq_len: int, rows: int, half: bool) -> float:
    """Bytes one layer keeps per token for its backward pass; rows: of the micro-batch, the side sequence included."""
    number = 2 if half else 4
    # Two norms with float32 inputs, their outputs, the MLP's gate, its SiLU, up and product.
    block = 24 * config.hidden_size + 8 + 4 * number * config.mlp_size
    if mixer == "mlp":
        return block + 4 * number * config.mlp_mixer_size
    own: float = BEYOND_ATTENTION.get(mixer, ATTENTION)[half] * config.hidden_size + 4 * config.num_heads
    if config.qk_norm:  # of the side sequence alone where there is one
        own += QK_NORM[half] * config.hidden_size / (rows if mixer in WITH_SIDE_SEQUENCE else 1)
    pairs: float = PAIRS.get(mixer, (0, 0))[half] * config.num_heads * seq_len
    if mixer in WITH_SIDE_SEQUENCE:
        pairs /= rows  # one map serves all
    elif mixer == "taylor" and seq_len > TAYLOR_STATE_FROM * _taylor_features(config):
        pairs = 4 * config.kv_heads * _taylor_features(config) * (config.head_dim + 1) / TAYLOR_CHUNK  # kept states
    elif mixer in IN_QUERY_BLOCKS and seq_len > QUERY_ROWS:
        pairs = 0
    return block + own + pairs


def _checkpointed_bytes(config: ModelConfig, half: bool, selective: bool) -> float:
    """Bytes per token of a checkpointed layer: its input and, of `elliptical`, the values of the layer below; if
    selective, the outputs of its matrix products and of its attention too."""
    number, kv_size = 2 if half else 4, config.kv_heads * config.head_dim
    kept: float = 4 * config.hidden_size + (number * kv_size if config.mixer == "elliptical" else 0)
    if selective:
        mixer = max(3 * config.hidden_size + 2 * kv_size, 2 * config.mlp_mixer_size + config.hidden_size)
        kept += number * (mixer + 2 * config.mlp_size + config.hidden_size) + 4 * config.num_heads
    return kept


def _block_bytes(config: ModelConfig, mixer: str, seq_len: int, half: bool) -> float:
    """Bytes per token that a layer that works on blocks of queries needs for one of them; no two exist at once."""
    if mixer not in IN_QUERY_BLOCKS or seq_len <= QUERY_ROWS:
        return 0
    return 2 * PAIRS[mixer][half] * config.num_heads * QUERY_ROWS
