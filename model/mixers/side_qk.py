"""Attention weights that no input changes: RndEmbQK and FixedSeqQK of "Deconstructing Attention" (2510.11602)."""

from typing import ClassVar

from torch import Tensor

from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.mixers.standard import StandardAttention
from lazypipe.model.rope import Rope, apply_rope


class SideQKAttention(StandardAttention):
    """Causal softmax attention with Q, K = X W, X the layer's input on a fixed side sequence, and V from H.

    On the side sequence itself H = X, plain self-attention. One map serves every row of the batch.
    """

    reads_side_sequence: ClassVar[bool] = True

    def queries_and_keys(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        if inputs.maps is None:
            raise ValueError(
                f"random_qk and text_qk read queries and keys of a side sequence; an input {list(x.shape)} came "
                "without them; pass BlockInputs with the maps of this layer"
            )
        return inputs.maps

    def side_maps(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Rotated queries [1, H, L, D] and keys [1, Hkv, L, D] of the side sequence's normed layer input x."""
        q, k = self.unrotated(x)
        return apply_rope(q, rope), apply_rope(k, rope)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        values = self.per_query_head(v)
        batch_size, heads, key_len, head_dim = values.shape
        # The rows of the batch side by side as one wide value: the map is multiplied once, not copied for each row.
        wide = values.permute(1, 2, 0, 3).reshape(heads, key_len, batch_size * head_dim)
        # Packed documents of one length bring a copy of the map each.
        out = self.weights(q[:1], k[:1])[0].to(v.dtype) @ wide
        return out.view(heads, -1, batch_size, head_dim).permute(2, 0, 1, 3)


class RandomQKAttention(SideQKAttention):
    """The side sequence is random: embeddings drawn once from N(0, 0.02^2)."""


class TextQKAttention(SideQKAttention):
    """The side sequence is text: the first max_seq_len tokens of the training corpus."""
