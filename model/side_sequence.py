"""The fixed sequence from which random_qk and text_qk form queries and keys, whatever the input.

It goes through the blocks like an input of its own, once per step, and leaves queries and keys at each such layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lazypipe.model.config import ModelConfig
from lazypipe.model.layers import Draw, Embedding

RANDOM_STD = 0.02  # of the entries of a random sequence, as of fresh token embeddings
UNSET = -1


class Maps(NamedTuple):
    """What a layer makes of the side sequence: rotated queries [1, H, L, D] and keys [1, Hkv, L, D]."""

    queries: Tensor
    keys: Tensor


class SideSequence(nn.Module):
    """`config.max_seq_len` positions, fixed: random embeddings (random_qk) or tokens of the corpus (text_qk).

    A buffer, so in checkpoints and not in the parameter count. `initialise` draws the random one, pretraining sets the
    tokens.
    """

    vectors: Tensor | None
    tokens: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.length = config, config.max_seq_len
        random = config.mechanism.side_sequence == "random"
        self.register_buffer("vectors", torch.empty(self.length, config.hidden_size) if random else None)
        self.register_buffer("tokens", None if random else torch.full((self.length,), UNSET, dtype=torch.int64))
        self._kept: tuple[object, dict[int, Maps]] | None = None

    def initialise(self, draw: Draw) -> None:
        if self.vectors is not None:
            draw.normal("vectors", RANDOM_STD)

    def set_tokens(self, tokens: Tensor) -> None:
        """Take int64 [max_seq_len] as the sequence of text_qk; ValueError for another shape."""
        if self.tokens is None or tokens.shape != self.tokens.shape:
            raise ValueError(
                f"side tokens of shape {list(tokens.shape)} for a {self.config.mixer} model; "
                f"text_qk takes max_seq_len={self.length} of them, other mixers none"
            )
        self.tokens.copy_(tokens)

    def check_length(self, length: int) -> None:
        """Raise ValueError for an input longer than the sequence."""
        reason = self.config.too_long(length)
        if reason is not None:
            raise ValueError(f"input too long: {reason}")

    def embed(self, embedding: Embedding, length: int) -> Tensor:
        """The first `length` positions as input of the first layer, [1, length, hidden]."""
        if self.vectors is not None:
            return self.vectors[None, :length]
        assert self.tokens is not None
        if int(self.tokens[0]) == UNSET:
            raise ValueError("text_qk has no side tokens yet; give them with Transformer.side.set_tokens(...)")
        found: Tensor = embedding(self.tokens[None, :length])
        return found

    def maps(self, model: nn.Module, length: int, run: Callable[[int], dict[int, Maps]]) -> dict[int, Maps]:
        """`run(length)`, the maps by layer. In eval mode without gradient those of the whole sequence are kept.

        A pass with gradient or in training mode drops them, and so does writing to or replacing a tensor of the model.
        (The latter alone would not do: the fused AdamW leaves no trace in the tensors' version counters.)
        """
        if torch.is_grad_enabled() or self.training:
            self._kept = None
            return run(length)
        device = next(model.parameters()).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        tensors = (*model.parameters(), *model.buffers())
        state = (autocast, *((tensor.data_ptr(), tensor._version) for tensor in tensors))
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, run(self.length))
        return self._kept[1]
