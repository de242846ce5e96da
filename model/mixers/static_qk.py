"""Attention whose weights come from the token embeddings ("StaticEmbQK" of "Deconstructing Attention", 2510.11602)."""

from typing import ClassVar

from torch import Tensor

from lazypipe.model.mixers.base import SideInputs
from lazypipe.model.mixers.standard import StandardAttention
from lazypipe.model.rope import Rope, apply_rope


class StaticQKAttention(StandardAttention):
    """Causal softmax attention with Q, K = norm(e) W, e the token embeddings of the same input, and V from H.

    norm is the layer's own input norm: raw embeddings (standard deviation 0.02 at first) would give flat weights.
    """

    reads_embeddings: ClassVar[bool] = True

    def queries_and_keys(self, x: Tensor, rope: Rope, side: SideInputs | None = None) -> tuple[Tensor, Tensor]:
        if side is None or side.normed_embeddings is None:
            raise ValueError(
                f"static_qk reads the token embeddings of its input {list(x.shape)} and got none; "
                "pass SideInputs made ready by Block.mixer_input"
            )
        q, k = self.unrotated(side.normed_embeddings)
        return apply_rope(q, rope), apply_rope(k, rope)
