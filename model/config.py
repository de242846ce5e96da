"""What a model is, as data. Imports no torch, so that planning an experiment stays instant."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lazypipe.model.mixers.registry import MECHANISMS, STANDARD, Mechanism, mechanism
from lazypipe.model.pattern import Pattern, check_pattern_name, standard_layers


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
    mixer: str = Field(
        STANDARD,
        description="token mixer, or a baseline; `lazypipe variants` lists them",
        json_schema_extra={"choices": list(MECHANISMS)},
    )
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

    @field_validator("mixer")
    @classmethod
    def _mixer(cls, value: str) -> str:
        return mechanism(value).name

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
        self.mechanism.check(self)
        return self

    @property
    def mechanism(self) -> Mechanism:
        """The row of `mixer` in the table of mechanisms."""
        return mechanism(self.mixer)

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of the fields `names` that are not at their default."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer of each layer, from the first; of a baseline its name for each."""
        kept = standard_layers(self.pattern, self.num_layers)
        return tuple(STANDARD if layer in kept else self.mixer for layer in range(1, self.num_layers + 1))

    def too_long(self, length: int) -> str | None:
        """Why an input of `length` tokens cannot go through the model, as a sentence; None when it can."""
        if self.mechanism.side_sequence is None or length <= self.max_seq_len:
            return None
        return (
            f"{length} tokens are more than max_seq_len={self.max_seq_len}, where the side sequence of "
            f"mixer={self.mixer} ends; stay within it, or raise max_seq_len"
        )

    @property
    def missing_package(self) -> str | None:
        """Why this machine cannot build the model, as a sentence; None when it can. Imports no package."""
        package = self.mechanism.package
        if package is None or importlib.util.find_spec(package) is not None:
            return None
        return (
            f"mixer={self.mixer} is a model of the package flash-linear-attention, which is not installed; "
            "install it with: pip install 'lazypipe[baselines]' -c constraints.txt"
        )

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
    mixers = sum(mechanism(name).parameters(config) for name in config.layer_mixers)
    blocks = config.num_layers * (3 * hidden * config.mlp_size + 2 * hidden)
    embeddings = vocab_size * hidden * (1 if config.tie_embeddings else 2)
    return embeddings + mixers + blocks + hidden
