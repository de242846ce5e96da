"""Recurrent and linear models to compare with, built from flash-linear-attention's Hugging Face classes by name.

A baseline is a whole model, not a mixer: its blocks are the package's, with the proportions its authors published. Size
follows from the model it stands beside, the standard transformer of the same ModelConfig: as wide, as many heads, and
per block as many parameters, to the nearest 8 columns of its MLP; mamba2, which has no MLP, takes as many blocks as
come closest. Embedding and head are ours, so tying, initialisation and checkpoints are those of every other model.

The package's kernels are Triton programs: they need CUDA (or, to test with, Triton's interpreter). Building, counting,
saving and loading work everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lazypipe.model.cache import DecodingState
from lazypipe.model.config import ModelConfig, parameter_count
from lazypipe.model.layers import Embedding, Linear, initialise_weights
from lazypipe.model.packing import Documents
from lazypipe.model.transformer import Transformer


class BaselineError(ValueError):
    """A baseline that cannot be had here: names it, what is missing and what to do."""


@dataclass
class BaselineState(DecodingState):
    """The package's own decoding state."""

    past: Any = None


class BaselineModel(Transformer):
    """A baseline behind the interface of `Transformer`: logits, decoding, checkpoints. It has no attention weights.

    A subclass names the package's classes and says where it differs from the others.
    """

    config_class: ClassVar[str]  # of fla.models
    model_class: ClassVar[str]  # of fla.models, without a head
    has_mlp: ClassVar[bool] = True
    decodes_with_mask: ClassVar[bool] = False  # only with an attention mask

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0) -> None:
        nn.Module.__init__(self)
        self.config, self.vocab_size = config, vocab_size
        self.embedding = Embedding(vocab_size, config.hidden_size)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, vocab_size)
        self.layers, self.side = nn.ModuleList(), None  # no blocks of ours
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.backbone = self.build_backbone(config)
        if self.embedding.weight.device.type != "meta":
            ours = [(name, module) for name, module in self.named_children() if name in ("embedding", "head")]
            initialise_weights(ours, seed, config.init_std, config.num_layers)

    @property
    def undecayed(self) -> tuple[str, ...]:
        """Of the package's parameters all but the matrices; a convolution's are [channels, 1, width]."""
        return tuple(name for name, parameter in self.named_parameters() if parameter.ndim != 2)

    def hidden(self, tokens: Tensor, cache: DecodingState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """What the output matrix is applied to, [B, L, hidden], of tokens int64 [B, L] that continue the cache.

        cu_seqlens  int32 [N + 1], 0 = first < ... < last = L, beside tokens [1, L]: N documents, each as if alone.

        Raises BaselineError where it cannot compute, and for documents that it cannot keep apart (mamba2), ValueError
        for cu_seqlens that do not fit.
        """
        check_baseline(self.config, tokens.device)
        assert cache is None or isinstance(cache, BaselineState)
        past: dict[str, Any] = {"use_cache": False}
        if cu_seqlens is not None:
            if cache is not None:
                raise ValueError("a decoding cache holds one document per row; give either cache or cu_seqlens")
            if not self.config.mechanism.packs_documents:
                raise BaselineError(
                    f"mixer={self.config.mixer} cannot keep packed documents apart: the package carries its state "
                    "across borders; give it documents one by one, or leave cu_seqlens out"
                )
            past["cu_seqlens"] = Documents.packed(cu_seqlens, tokens).cu_seqlens.long()  # on the device of the tokens
        if cache is not None:
            cache.check_room(tokens.shape[1])
            past = {"use_cache": True, "past_key_values": cache.past}
            if cache.length and self.decodes_with_mask:
                past["attention_mask"] = tokens.new_ones(tokens.shape[0], cache.length + tokens.shape[1])
        out = self.backbone(inputs_embeds=self.embedding(tokens), return_dict=True, **past)
        if cache is not None:
            cache.past = out.past_key_values
            cache.length += tokens.shape[1]
        hidden: Tensor = out.last_hidden_state
        return hidden

    def new_cache(self, max_tokens: int) -> BaselineState:
        return BaselineState([], max_tokens)

    def attention_rows(
        self,
        tokens: Tensor,  # noqa: ARG002
        query_block: int,  # noqa: ARG002
        cu_seqlens: Tensor | None = None,  # noqa: ARG002
    ) -> Iterator[tuple[int, int, Tensor]]:
        return iter(())

    @property
    def attention_layers(self) -> list[int]:
        return []

    @classmethod
    def build_backbone(cls, config: ModelConfig) -> nn.Module:
        """The package's model without embedding and head, randomly initialised with its own rules."""
        if config.missing_package is not None:
            raise BaselineError(config.missing_package)
        backbone = cls._backbone(cls.matched_settings(config))
        backbone.register_module("embeddings", None)  # ours is used
        return backbone

    @classmethod
    def matched_settings(cls, config: ModelConfig) -> dict[str, Any]:
        """Arguments of the package's configuration, with the size of the module docstring."""
        settings = {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "norm_eps": config.norm_eps,
            "initializer_range": config.init_std,
            "vocab_size": 1,  # the embedding is ours
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
            **cls.head_settings(config),
        }
        hidden = config.hidden_size
        target = parameter_count(config, 1) - hidden * (2 if not config.tie_embeddings else 1) - hidden  # all blocks
        one_block = {**settings, "num_hidden_layers": 1}
        if not cls.has_mlp:
            return {**settings, "num_hidden_layers": max(1, round(target / cls.block_parameters(one_block)))}
        without_mlp = cls.block_parameters({**one_block, "intermediate_size": 8}) - 3 * hidden * 8
        columns = (target / config.num_layers - without_mlp) / (3 * hidden)
        return {**settings, "intermediate_size": max(8, 8 * round(columns / 8))}

    @classmethod
    def head_settings(cls, config: ModelConfig) -> dict[str, Any]:
        """What the package's configuration is told of heads and context length."""
        return {"num_heads": config.num_heads, "max_position_embeddings": config.max_seq_len}

    @classmethod
    def block_parameters(cls, settings: dict[str, Any]) -> int:
        """Parameters of the blocks of a backbone with these settings; nothing is allocated."""
        with torch.device("meta"):
            backbone = cls._backbone(settings)
        return sum(parameter.numel() for parameter in backbone.get_submodule("layers").parameters())

    @classmethod
    def _backbone(cls, settings: dict[str, Any]) -> nn.Module:
        import fla.models

        config_class, model_class = getattr(fla.models, cls.config_class), getattr(fla.models, cls.model_class)
        backbone: nn.Module = model_class(config_class(**settings))
        return backbone


class RetNet(BaselineModel):
    config_class, model_class = "RetNetConfig", "RetNetModel"


class Mamba2(BaselineModel):
    config_class, model_class = "Mamba2Config", "Mamba2Model"
    has_mlp = False

    @classmethod
    def head_settings(cls, config: ModelConfig) -> dict[str, Any]:
        return {"head_dim": config.head_dim}


class GatedLinearAttention(BaselineModel):
    config_class, model_class = "GLAConfig", "GLAModel"


class DeltaNet(BaselineModel):
    config_class, model_class = "DeltaNetConfig", "DeltaNetModel"


class GatedDeltaNet(BaselineModel):
    config_class, model_class = "GatedDeltaNetConfig", "GatedDeltaNetModel"

    @classmethod
    def head_settings(cls, config: ModelConfig) -> dict[str, Any]:
        """Keys of 3/4 hidden_size and values of 3/2, as published."""
        return {**super().head_settings(config), "head_dim": max(8, 8 * round(config.head_dim * 3 / 32))}


class ForgettingTransformer(BaselineModel):
    config_class, model_class = "ForgettingTransformerConfig", "ForgettingTransformerModel"
    decodes_with_mask = True

    @classmethod
    def head_settings(cls, config: ModelConfig) -> dict[str, Any]:
        return {"num_heads": config.num_heads}


def build_model(config: ModelConfig, vocab_size: int, seed: int = 0, kernel: str = "auto") -> Transformer:
    """The model of `config`, initialised from `seed`: a `Transformer`, or a baseline. BaselineError without package."""
    if config.mechanism.whole_model:
        baseline: Transformer = config.mechanism.load()(config, vocab_size, seed)
        return baseline
    return Transformer(config, vocab_size, seed, kernel)


def check_baseline(config: ModelConfig, device: torch.device) -> None:
    """Raise BaselineError when `config` is a baseline whose package is missing, or that cannot compute on `device`."""
    if config.missing_package is not None:
        raise BaselineError(config.missing_package)
    if config.mechanism.whole_model and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BaselineError(
            f"mixer={config.mixer} computes with CUDA kernels of flash-linear-attention, and this is a {device.type} "
            "device; run it on a machine with an NVIDIA GPU (resources.pretrain.gpus_per_worker: 1, "
            "resources.evaluate.gpus: 1), or choose another mixer"
        )
