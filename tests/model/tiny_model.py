"""Models small enough for every test, random enough for a mistake to show."""

import torch
from torch import Tensor

from lazypipe.model.config import ModelConfig
from lazypipe.model.transformer import Transformer

VOCAB = 61


def tiny(mixer: str, **fields: object) -> ModelConfig:
    """Two layers, four heads, W = 8: lengths beyond W and beyond max_seq_len are short."""
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 32, "max_bias_length": 8}
    return ModelConfig.model_validate({**shape, "mixer": mixer, **fields})


def awake(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose logits, biases and thresholds are far from flat."""
    model = Transformer(config, VOCAB, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("tau"):
                parameter.uniform_(-1.0, 0.3, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return with_side_text(model).eval()


def with_side_text(model: Transformer) -> Transformer:
    """The model, with some text where it needs one as its side sequence (text_qk)."""
    if model.side is not None and model.side.tokens is not None:
        model.side.set_tokens(torch.arange(model.side.length) * 7 % model.vocab_size)
    return model


def some_tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def sparsity_by_layer(
    model: Transformer, tokens: Tensor, cu_seqlens: Tensor | None = None
) -> list[float | None] | None:
    """Share of exactly-zero attention weights of each layer; None where no layer can have any."""
    shares = [share for share, _ in model.statistics_by_layer(tokens, cu_seqlens)]
    return shares if any(share is not None for share in shares) else None
