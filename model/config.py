"""What a model is, as data. Imports no torch, so that planning an experiment stays instant."""

from __future__ import annotations

import importlib.util
import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lazypipe.model.pattern import Pattern, check_pattern_name, standard_layers

MIXERS: dict[str, str] = {
    "standard": "causal softmax attention with RoPE (Vaswani et al. 2017; Su et al. 2021)",
    "lazy": "Lazy Attention: RoPE + learnable distance bias + Elastic-Softmax (arXiv 2601.00919)",
    "mlp": "no token mixing: a gated MLP of the same size (Deconstructing Attention, arXiv 2510.11602)",
    "taylor": "softmax by its second-order Taylor series, linear time (arXiv 2510.11602; Based, Arora et al. 2024)",
    "gating": "softmax over scores of the keys alone, linear time, no position (arXiv 2510.11602)",
    "random_qk": "queries and keys from a fixed random sequence, values from the hidden states (arXiv 2510.11602)",
    "text_qk": "queries and keys from a fixed text, values from the hidden states (arXiv 2510.11602)",
    "static_qk": "queries and keys from the token embeddings, values from the hidden states (arXiv 2510.11602)",
    "softmax1": "softmax off by one: exp(s) / (1 + sum exp(s)) (Miller 2023)",
    "sink": "softmax with one learned logit per head in its denominator (gpt-oss 2025)",
    "sigmoid": "a sigmoid per weight, not normalised (Ramapuram et al. 2024, arXiv 2409.04431)",
    "entmax": "1.5-entmax, softmax with exact zeros (Peters et al. 2019, arXiv 1905.05702)",
    "stick_breaking": "the nearest keys take their share first, no RoPE (Tan et al. 2024, arXiv 2410.17980)",
    "elliptical": "softmax, coordinates scaled by their change between layers (Nielsen et al. 2024, arXiv 2406.13770)",
    "alibi": "softmax with a linear distance penalty in place of RoPE (Press et al. 2022, arXiv 2108.12409)",
    "swa": "softmax over a sliding window, and the first tokens if wanted (StreamingLLM, Xiao et al. 2023)",
}

MixerName = Literal[
    "standard",
    "lazy",
    "mlp",
    "taylor",
    "gating",
    "random_qk",
    "text_qk",
    "static_qk",
    "softmax1",
    "sink",
    "sigmoid",
    "entmax",
    "stick_breaking",
    "elliptical",
    "alibi",
    "swa",
]

# Whole models of the package flash-linear-attention, imported as `fla`; see model/baselines.py.
BASELINE_PACKAGE = "fla"
BASELINES: dict[str, str] = {
    "retnet": "retention: linear attention with a fixed decay per head (Sun et al. 2023, arXiv 2307.08621)",
    "mamba2": "state space duality, no MLP (Dao and Gu 2024, arXiv 2405.21060)",
    "gla": "gated linear attention (Yang et al. 2023, arXiv 2312.06635)",
    "delta_net": "linear attention by the delta rule (Yang et al. 2024, arXiv 2406.06484)",
    "gated_deltanet": "the delta rule with a forget gate (Yang et al. 2024, arXiv 2412.06464)",
    "forgetting_transformer": "softmax attention with a forget gate (Lin et al. 2025, arXiv 2503.02130)",
}

BaselineName = Literal["retnet", "mamba2", "gla", "delta_net", "gated_deltanet", "forgetting_transformer"]
AnyMixer = Literal[MixerName, BaselineName]

WITHOUT_ATTENTION: frozenset[str] = frozenset({"mlp"})  # mixers that have no attention weights to analyse
WITH_SIDE_SEQUENCE = frozenset({"random_qk", "text_qk"})  # mixers that read a side sequence of max_seq_len positions
LAZY_SWITCHES = ("lazy_bias", "lazy_rope", "lazy_elastic", "lazy_tau_scope", "lazy_threshold")


class ModelConfig(BaseModel):
    """Shape of a decoder-only transformer. The vocabulary size comes from the tokenizer, not from here."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    hidden_size: int = Field(128, gt=0, description="width of the residual stream, d")
    num_layers: int = Field(4, gt=0, description="number of transformer blocks")
    num_heads: int = Field(4, gt=0, description="number of query heads; must divide hidden_size")
    num_kv_heads: int | None = Field(
        None, gt=0, description="number of key/value heads (grouped-query attention); default: num_heads"
    )
    intermediate_size: int | None = Field(
        None, gt=0, description="width of the SwiGLU MLP; default: 8/3 hidden_size rounded up to a multiple of 32"
    )
    max_seq_len: int = Field(256, gt=0, description="context length in tokens the model is meant for")
    mixer: AnyMixer = Field("standard", description="token mixer, or a baseline; `lazypipe variants` lists them")
    pattern: Pattern = Field(
        "uniform",
        description="layers that keep standard attention instead of the mixer: a name, or a list counted from 1",
    )
    qk_norm: bool = Field(False, description="RMSNorm on each head of Q and K, before RoPE")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary position embedding")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of RMSNorm")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the weight initialisation")
    tie_embeddings: bool = Field(True, description="share the input and output embedding matrix")
    max_bias_length: int = Field(
        512, gt=0, description="lazy: W, distances below this get a learnable bias per head (authors: 512)"
    )
    tau_init: float = Field(
        -1.0, description="lazy: initial Elastic-Softmax offset tau (paper: -1, cuts below-average weights)"
    )
    bias_init_std: float = Field(1e-3, ge=0, description="lazy: standard deviation of the initial distance bias")
    lazy_bias: bool = Field(True, description="lazy: the learnable distance bias (false: ablated)")
    lazy_rope: bool = Field(True, description="lazy: RoPE on Q and K (false: ablated)")
    lazy_elastic: bool = Field(True, description="lazy: Elastic-Softmax (false: tau = 0, softmax with the bias)")
    lazy_tau_scope: Literal["head", "layer"] = Field("head", description="lazy: one tau per head, or one for a layer")
    lazy_threshold: Literal["relative", "constant"] = Field(
        "relative", description="lazy: tau / n_i is added to a weight of query i, or tau itself"
    )
    sigmoid_bias: float | None = Field(None, description="sigmoid: b, added to every score; default: -log(max_seq_len)")
    sigmoid_bias_learnable: bool = Field(False, description="sigmoid: learn b per head, from the same start")
    swa_window: int = Field(128, gt=0, description="swa: keys a query sees, its own included")
    swa_sink_tokens: int = Field(0, ge=0, description="swa: first tokens every later query sees too")
    stick_breaking_remainder: bool = Field(
        False, description="stick_breaking: what the keys leave goes to the query's own value (default: to nothing)"
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern(cls, value: object) -> object:
        return check_pattern_name(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; "
                "choose a divisor so that every head has the same width"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} (hidden_size/num_heads) is odd; RoPE rotates pairs, so it must be even"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.kv_heads} does not divide num_heads={self.num_heads}; "
                "every key/value head serves the same number of query heads"
            )
        standard_layers(self.pattern, self.num_layers)
        for name in ("lazy_tau_scope", "lazy_threshold"):
            if not self.lazy_elastic and name in self.changed_lazy_switches:
                raise ValueError(
                    f"{name}={getattr(self, name)} says something about tau, and lazy_elastic=false has none; "
                    "leave one of the two out"
                )
        if self.mixer == "lazy" and self.lazy_threshold == "constant" and self.tau_init <= -1:
            raise ValueError(
                f"tau_init={self.tau_init:g} with lazy_threshold=constant cuts every weight (none is above 1), and no "
                "gradient would ever come back; set tau_init above -1, "
                f"e.g. {-1 / self.max_seq_len:.2g} (-1 / max_seq_len)"
            )
        if self.mixer in BASELINES:
            self._check_baseline()
        return self

    def _check_baseline(self) -> None:
        grouped = self.kv_heads != self.num_heads
        found = {"pattern": self.pattern != "uniform", "num_kv_heads": grouped, "qk_norm": self.qk_norm}
        for name, wrong in found.items():
            if wrong:
                raise ValueError(
                    f"{name}={getattr(self, name)} does not go with mixer={self.mixer}, which is a whole model and no "
                    f"mixer of single layers; leave {name} at its default in this variant"
                )

    @property
    def changed_lazy_switches(self) -> list[str]:
        """The ablation switches of Lazy Attention that are not at their defaults."""
        return [name for name in LAZY_SWITCHES if getattr(self, name) != type(self).model_fields[name].default]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def layer_mixers(self) -> tuple[AnyMixer, ...]:
        """The mixer of each layer, from the first; of a baseline its name for each."""
        kept = standard_layers(self.pattern, self.num_layers)
        return tuple("standard" if layer in kept else self.mixer for layer in range(1, self.num_layers + 1))

    def too_long(self, length: int) -> str | None:
        """Why an input of `length` tokens cannot go through the model, as a sentence; None when it can."""
        if self.mixer not in WITH_SIDE_SEQUENCE or length <= self.max_seq_len:
            return None
        return (
            f"{length} tokens are more than max_seq_len={self.max_seq_len}, where the side sequence of "
            f"mixer={self.mixer} ends; stay within it, or raise max_seq_len"
        )

    @property
    def missing_package(self) -> str | None:
        """Why this machine cannot build the model, as a sentence; None when it can. Imports no package."""
        if self.mixer not in BASELINES or importlib.util.find_spec(BASELINE_PACKAGE) is not None:
            return None
        return (
            f"mixer={self.mixer} is a model of the package flash-linear-attention, which is not installed; "
            "install it with: pip install 'lazypipe[baselines]' -c constraints.txt"
        )

    @property
    def initial_sigmoid_bias(self) -> float:
        return -math.log(self.max_seq_len) if self.sigmoid_bias is None else self.sigmoid_bias

    @property
    def mlp_size(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-8 * self.hidden_size // 3 // 32) * 32

    @property
    def mlp_mixer_size(self) -> int:
        """Width of the mixer `mlp`: three matrices with the parameters of attention's four, never rounded further."""
        return round(2 * (self.hidden_size + self.kv_heads * self.head_dim) / 3)


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Number of parameters of `Transformer(config, vocab_size)`. A tied embedding counts once.

    Of a baseline: that of the standard model it is matched to.
    """
    hidden = config.hidden_size
    mixers = sum(_mixer_parameters(config, mixer) for mixer in config.layer_mixers)
    blocks = config.num_layers * (3 * hidden * config.mlp_size + 2 * hidden)
    embeddings = vocab_size * hidden * (1 if config.tie_embeddings else 2)
    return embeddings + mixers + blocks + hidden


def _mixer_parameters(config: ModelConfig, mixer: AnyMixer) -> int:
    hidden, kv_size = config.hidden_size, config.kv_heads * config.head_dim
    attention = 2 * hidden * hidden + 2 * hidden * kv_size + (2 * config.head_dim if config.qk_norm else 0)
    match mixer:
        case "lazy":
            biases = config.num_heads * config.max_bias_length if config.lazy_bias else 0
            thresholds = {"head": config.num_heads, "layer": 1}[config.lazy_tau_scope] if config.lazy_elastic else 0
            return attention + biases + thresholds
        case "mlp":
            return 3 * hidden * config.mlp_mixer_size
        case "sink":
            return attention + config.num_heads
        case "sigmoid":
            return attention + (config.num_heads if config.sigmoid_bias_learnable else 0)
        case _:
            return attention
