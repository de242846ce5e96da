"""Configuration of a model exported by lazypipe. Self-contained: needs transformers alone."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

MIXERS = ("standard", "lazy", "mlp", "taylor", "gating", "random_qk", "text_qk", "static_qk")
SIDE_SEQUENCES = {"random_qk": "random", "text_qk": "text"}  # what their fixed sequence consists of


class LazypipeConfig(PretrainedConfig):  # type: ignore[misc]
    """Shape of a decoder-only transformer whose layers may mix tokens in different ways.

    layer_mixers: the mixer of each layer, from the first; names as in `MIXERS`.
    mixer_intermediate_size: width of the gated MLP in the place of attention (mixer mlp).
    max_bias_length: W, the distances below it have a learned bias (mixer lazy).
    max_position_embeddings: trained context length; also the end of the side sequence (mixers random_qk, text_qk).
    """

    model_type = "lazypipe"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 2048,
        hidden_size: int = 128,
        intermediate_size: int = 352,
        mixer_intermediate_size: int = 171,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        layer_mixers: Sequence[str] | None = None,
        max_position_embeddings: int = 256,
        max_bias_length: int = 512,
        qk_norm: bool = False,
        rope_theta: float = 10_000.0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.mixer_intermediate_size = mixer_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.layer_mixers = list(layer_mixers or ["standard"] * num_hidden_layers)
        self.max_position_embeddings = max_position_embeddings
        self.max_bias_length = max_bias_length
        self.qk_norm = qk_norm
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        unknown = sorted(set(self.layer_mixers) - set(MIXERS))
        if unknown or len(self.layer_mixers) != num_hidden_layers:
            raise ValueError(
                f"layer_mixers={self.layer_mixers} for num_hidden_layers={num_hidden_layers}; "
                f"expected one of {', '.join(MIXERS)} for each layer"
            )
        sequences = {SIDE_SEQUENCES[name] for name in self.layer_mixers if name in SIDE_SEQUENCES}
        if len(sequences) > 1:
            raise ValueError(f"layer_mixers holds {' and '.join(SIDE_SEQUENCES)}; a model has one side sequence")
        kwargs.pop("head_dim", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
