"""Attention whose weights come from the token embeddings ("StaticEmbQK" of "Deconstructing Attention", 2510.11602)."""

from typing import ClassVar

from torch import Tensor

from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.mixers.standard import StandardAttention


class StaticQKAttention(StandardAttention):
    """Causal softmax attention with Q, K = norm(e) W, e the token embeddings of the same input, and V from H.

    norm is the layer's own input norm: raw embeddings (standard deviation 0.02 at first) would give flat weights.
    """

    reads_embeddings: ClassVar[bool] = True

    def queries_and_keys(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        if inputs.embeddings is None:
            raise ValueError(
                f"static_qk reads the token embeddings of its input {list(x.shape)} and got none; "
                "pass BlockInputs with the embeddings through the norm of this layer"
            )
        return super().queries_and_keys(inputs.embeddings, inputs)
