"""The table of mechanisms: one row for each mixer and for each baseline model. Imports no torch.

A mechanism is a file with its class and a row here; everything else asks the row or the class, never the name. Costs
that differ from those of plain attention are functions of model/mixers/costs.py.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lazypipe.model.mixers import costs

if TYPE_CHECKING:
    from lazypipe.model.config import ModelConfig

STANDARD = "standard"  # the reference: what a pattern keeps in a hybrid, and what reports compare with


def always(config: ModelConfig) -> bool:  # noqa: ARG001
    return True


def never(config: ModelConfig) -> bool:  # noqa: ARG001
    return False


def nothing_to_check(config: ModelConfig) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What is known of a mechanism without loading torch. Functions take the configuration of the whole model.

    name              as in `ModelConfig.mixer`
    description       one line; paper: where it comes from
    source            "module:Class", a `TokenMixer`, or with whole_model a `BaselineModel`; imported when it is built
    fields            the fields of ModelConfig that only this mechanism reads
    ablations         those of `fields` that, away from their default, make another mechanism of it
    check             raises ValueError for fields that do not go together

    parameters        of one layer's mixer; the next two are those of model/mixers/costs.py
    flops             (config, seq_len): operations of a forward pass per token
    saved_bytes       (config, seq_len, rows, half): what the backward pass needs per token

    has_weights       has attention weights, which can be analysed
    side_sequence     the fixed sequence it takes queries and keys from: random vectors, or text of the corpus
    reads_values      reads the values of the attention layer below
    sink_logit        learns one logit per head that competes with the keys, and can be balanced (pretrain.sink_balance)
    has_tau           learns Elastic-Softmax offsets, tau
    has_bias          learns a bias per distance
    has_kernel        is computed by lazypipe.kernels, with the backend of pretrain.kernel
    computed_by       what else computes it: sdpa is torch's fused attention
    compiles_packed   torch.compile can compile it with packed documents inside a checkpointed block
    packs_documents   can keep packed documents apart
    exportable        the modelling file of model/export computes it
    whole_model       a model of the package `package`, not a mixer of single layers
    """

    name: str
    description: str
    paper: str
    source: str
    fields: tuple[str, ...] = ()
    ablations: tuple[str, ...] = ()
    check: Callable[[ModelConfig], None] = nothing_to_check
    parameters: Callable[[ModelConfig], int] = costs.attention_parameters
    flops: Callable[[ModelConfig, int], float] = costs.attention_flops
    saved_bytes: Callable[[ModelConfig, int, int, bool], costs.SavedBytes] = costs.attention_bytes
    has_weights: bool = True
    side_sequence: Literal["random", "text"] | None = None
    reads_values: bool = False
    sink_logit: bool = False
    has_tau: Callable[[ModelConfig], bool] = never
    has_bias: Callable[[ModelConfig], bool] = never
    has_kernel: Callable[[ModelConfig], bool] = never
    computed_by: str = "torch"
    compiles_packed: Callable[[ModelConfig], bool] = never
    packs_documents: bool = True
    exportable: bool = False
    whole_model: bool = False
    package: str | None = None

    @property
    def summary(self) -> str:
        return f"{self.description} ({self.paper})"

    @property
    def shardable(self) -> bool:
        """Whether FSDP2 can shard it block by block: a side sequence passes through blocks out of their turn."""
        return not self.whole_model and self.side_sequence is None

    def load(self) -> Any:
        """The class of `source`."""
        module, _, name = self.source.partition(":")
        return getattr(importlib.import_module(module), name)


def check_lazy(config: ModelConfig) -> None:
    if not config.lazy_elastic:
        for name in config.changed(("lazy_tau_scope", "lazy_threshold")):
            raise ValueError(
                f"{name}={getattr(config, name)} says something about tau, and lazy_elastic=false has none; "
                "leave one of the two out"
            )
    if config.lazy_threshold == "constant" and config.tau_init <= -1:
        raise ValueError(
            f"tau_init={config.tau_init:g} with lazy_threshold=constant cuts every weight (none is above 1), and no "
            "gradient would ever come back; set tau_init above -1, "
            f"e.g. {-1 / config.max_seq_len:.2g} (-1 / max_seq_len)"
        )


def has_lazy_kernel(config: ModelConfig) -> bool:
    return config.lazy_threshold == "relative"


def check_whole_model(config: ModelConfig) -> None:
    grouped = config.kv_heads != config.num_heads
    asked = {"pattern": config.pattern != "uniform", "num_kv_heads": grouped, "qk_norm": config.qk_norm}
    for name, wrong in asked.items():
        if wrong:
            raise ValueError(
                f"{name}={getattr(config, name)} does not go with mixer={config.mixer}, which is a whole model and no "
                f"mixer of single layers; leave {name} at its default in this variant"
            )


LAZY_ABLATIONS = ("lazy_bias", "lazy_rope", "lazy_elastic", "lazy_tau_scope", "lazy_threshold")

MIXER_ROWS = (
    Mechanism(
        name=STANDARD,
        description="causal softmax attention with RoPE",
        paper="Vaswani et al. 2017; Su et al. 2021",
        source="lazypipe.model.mixers.standard:StandardAttention",
        computed_by="sdpa",
        exportable=True,
    ),
    Mechanism(
        name="lazy",
        description="Lazy Attention: RoPE + learnable distance bias + Elastic-Softmax",
        paper="arXiv 2601.00919",
        source="lazypipe.model.mixers.lazy:LazyAttention",
        fields=("max_bias_length", "tau_init", "bias_init_std", *LAZY_ABLATIONS),
        ablations=LAZY_ABLATIONS,
        check=check_lazy,
        parameters=costs.lazy_parameters,
        saved_bytes=costs.lazy_bytes,
        has_tau=lambda config: config.lazy_elastic,
        has_bias=lambda config: config.lazy_bias,
        has_kernel=has_lazy_kernel,
        compiles_packed=has_lazy_kernel,
        exportable=True,
    ),
    Mechanism(
        name="mlp",
        description="no token mixing: a gated MLP of the same size",
        paper="Deconstructing Attention, arXiv 2510.11602",
        source="lazypipe.model.mixers.mlp:MlpMixer",
        parameters=costs.mlp_parameters,
        flops=costs.mlp_flops,
        saved_bytes=costs.mlp_bytes,
        has_weights=False,
        compiles_packed=always,
        exportable=True,
    ),
    Mechanism(
        name="taylor",
        description="softmax by its second-order Taylor series, linear time",
        paper="arXiv 2510.11602; Based, Arora et al. 2024",
        source="lazypipe.model.mixers.taylor:TaylorAttention",
        flops=costs.taylor_flops,
        saved_bytes=costs.taylor_bytes,
        exportable=True,
    ),
    Mechanism(
        name="gating",
        description="softmax over scores of the keys alone, linear time, no position",
        paper="arXiv 2510.11602",
        source="lazypipe.model.mixers.gating:GatingMixer",
        flops=costs.gating_flops,
        saved_bytes=partial(costs.attention_bytes, per_hidden=(28, 28)),
        exportable=True,
    ),
    Mechanism(
        name="random_qk",
        description="queries and keys from a fixed random sequence, values from the hidden states",
        paper="arXiv 2510.11602",
        source="lazypipe.model.mixers.side_qk:RandomQKAttention",
        flops=costs.side_flops,
        saved_bytes=costs.side_bytes,
        side_sequence="random",
        exportable=True,
    ),
    Mechanism(
        name="text_qk",
        description="queries and keys from a fixed text, values from the hidden states",
        paper="arXiv 2510.11602",
        source="lazypipe.model.mixers.side_qk:TextQKAttention",
        flops=costs.side_flops,
        saved_bytes=costs.side_bytes,
        side_sequence="text",
        exportable=True,
    ),
    Mechanism(
        name="static_qk",
        description="queries and keys from the token embeddings, values from the hidden states",
        paper="arXiv 2510.11602",
        source="lazypipe.model.mixers.static_qk:StaticQKAttention",
        saved_bytes=partial(costs.attention_bytes, per_hidden=(25, 16)),
        exportable=True,
    ),
    Mechanism(
        name="softmax1",
        description="softmax off by one: exp(s) / (1 + sum exp(s))",
        paper="Miller 2023",
        source="lazypipe.model.mixers.softmax1:Softmax1Attention",
        saved_bytes=partial(costs.attention_bytes, per_hidden=(22, 14)),
    ),
    Mechanism(
        name="sink",
        description="softmax with one learned logit per head in its denominator",
        paper="gpt-oss 2025",
        source="lazypipe.model.mixers.sink:SinkAttention",
        parameters=costs.sink_parameters,
        saved_bytes=partial(costs.attention_bytes, per_hidden=(31, 18)),
        sink_logit=True,
    ),
    Mechanism(
        name="sigmoid",
        description="a sigmoid per weight, not normalised",
        paper="Ramapuram et al. 2024, arXiv 2409.04431",
        source="lazypipe.model.mixers.sigmoid:SigmoidAttention",
        fields=("sigmoid_bias", "sigmoid_bias_learnable"),
        parameters=costs.sigmoid_parameters,
        saved_bytes=partial(costs.attention_bytes, per_pair=(9, 7), in_query_blocks=True),
    ),
    Mechanism(
        name="entmax",
        description="1.5-entmax, softmax with exact zeros",
        paper="Peters et al. 2019, arXiv 1905.05702",
        source="lazypipe.model.mixers.entmax:EntmaxAttention",
        saved_bytes=partial(costs.attention_bytes, per_pair=(29, 27), in_query_blocks=True),
    ),
    Mechanism(
        name="stick_breaking",
        description="the nearest keys take their share first, no RoPE",
        paper="Tan et al. 2024, arXiv 2410.17980",
        source="lazypipe.model.mixers.stick_breaking:StickBreakingAttention",
        fields=("stick_breaking_remainder",),
        saved_bytes=partial(costs.attention_bytes, per_pair=(25, 23), in_query_blocks=True),
    ),
    Mechanism(
        name="elliptical",
        description="softmax, coordinates scaled by their change between layers",
        paper="Nielsen et al. 2024, arXiv 2406.13770",
        source="lazypipe.model.mixers.elliptical:EllipticalAttention",
        saved_bytes=partial(costs.attention_bytes, per_hidden=(21, 16)),
        reads_values=True,
    ),
    Mechanism(
        name="alibi",
        description="softmax with a linear distance penalty in place of RoPE",
        paper="Press et al. 2022, arXiv 2108.12409",
        source="lazypipe.model.mixers.alibi:AlibiAttention",
        saved_bytes=partial(costs.attention_bytes, per_pair=(2, 2), in_query_blocks=True),
    ),
    Mechanism(
        name="swa",
        description="softmax over a sliding window, and the first tokens if wanted",
        paper="StreamingLLM, Xiao et al. 2023",
        source="lazypipe.model.mixers.swa:SlidingWindowAttention",
        fields=("swa_window", "swa_sink_tokens"),
        flops=costs.swa_flops,
        saved_bytes=partial(costs.attention_bytes, per_hidden=(21, 14), per_pair=(1, 1), in_query_blocks=True),
    ),
)


def baseline(name: str, cls: str, description: str, paper: str, packs_documents: bool = True) -> Mechanism:
    """A row of a model of flash-linear-attention (imported as fla). Costs: of the standard model it is matched to."""
    return Mechanism(
        name=name,
        description=description,
        paper=paper,
        source=f"lazypipe.model.baselines:{cls}",
        check=check_whole_model,
        has_weights=False,
        computed_by="fla",
        packs_documents=packs_documents,
        whole_model=True,
        package="fla",
    )


BASELINE_ROWS = (
    baseline(
        "retnet",
        "RetNet",
        "retention: linear attention with a fixed decay per head",
        "Sun et al. 2023, arXiv 2307.08621",
    ),
    # The package carries the state across borders.
    baseline(
        "mamba2",
        "Mamba2",
        "state space duality, no MLP",
        "Dao and Gu 2024, arXiv 2405.21060",
        packs_documents=False,
    ),
    baseline("gla", "GatedLinearAttention", "gated linear attention", "Yang et al. 2023, arXiv 2312.06635"),
    baseline("delta_net", "DeltaNet", "linear attention by the delta rule", "Yang et al. 2024, arXiv 2406.06484"),
    baseline(
        "gated_deltanet", "GatedDeltaNet", "the delta rule with a forget gate", "Yang et al. 2024, arXiv 2412.06464"
    ),
    baseline(
        "forgetting_transformer",
        "ForgettingTransformer",
        "softmax attention with a forget gate",
        "Lin et al. 2025, arXiv 2503.02130",
    ),
)

MIXERS: dict[str, Mechanism] = {row.name: row for row in MIXER_ROWS}
BASELINES: dict[str, Mechanism] = {row.name: row for row in BASELINE_ROWS}
MECHANISMS: dict[str, Mechanism] = MIXERS | BASELINES


def mechanism(name: str) -> Mechanism:
    """The row of `name`; ValueError with the nearest name when there is none."""
    if name in MECHANISMS:
        return MECHANISMS[name]
    close = difflib.get_close_matches(name, MECHANISMS, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"there is no mixer {name!r}{hint} (known: {', '.join(MECHANISMS)})")
