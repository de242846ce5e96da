"""The model sizes of the two papers, and how many parameters they have. Imports no torch.

Bias-free, RMSNorm, SwiGLU, RoPE, multi-head. 70M to 1.7B are those of "Deconstructing Attention" (arXiv 2510.11602)
with the padded vocabulary of the Pythia tokenizer, 340M and 760M those of Lazy Attention (arXiv 2601.00919) with a 32k
SentencePiece vocabulary; the shape of 760M is ours, for the paper does not print one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lazypipe.model.config import ModelConfig, parameter_count

PYTHIA_VOCABULARY, SENTENCEPIECE_VOCABULARY = 50_304, 32_000


class Size(NamedTuple):
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    qk_norm: bool = False

    def model(self, **fields: Any) -> ModelConfig:
        """The model of this size; `fields` add to it or replace some."""
        shape = {name: value for name, value in self._asdict().items() if name != "vocab_size"}
        return ModelConfig.model_validate(shape | fields)


SIZES: dict[str, Size] = {
    "70M": Size(512, 2048, 6, 8, PYTHIA_VOCABULARY),
    "160M": Size(768, 3072, 12, 12, PYTHIA_VOCABULARY),
    "500M": Size(896, 4864, 24, 14, PYTHIA_VOCABULARY),
    "1.7B": Size(2048, 6144, 28, 16, PYTHIA_VOCABULARY, qk_norm=True),
    "340M": Size(1024, 2816, 24, 16, SENTENCEPIECE_VOCABULARY),
    "760M": Size(1536, 4096, 24, 16, SENTENCEPIECE_VOCABULARY),
}


def size_row(name: str) -> dict[str, Any]:
    """One size with its parameter counts; lazy_adds: what Lazy Attention with W = 512 in every layer has more."""
    size = SIZES[name]
    standard = size.model()
    vocab = size.vocab_size
    return {
        "size": name,
        **size._asdict(),
        "head_dim": standard.head_dim,
        "non_embedding": parameter_count(standard, 0),
        "tied": parameter_count(standard, vocab),
        "untied": parameter_count(size.model(tie_embeddings=False), vocab),
        "lazy_adds": parameter_count(size.model(mixer="lazy", max_bias_length=512), vocab)
        - parameter_count(standard, vocab),
    }
