"""What incremental decoding remembers between calls."""

from dataclasses import dataclass

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens one layer has seen. Room for `max_tokens` is taken at the first call."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.length = 0
        self._keys = self._values = torch.empty(0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys [B or 1, Hkv, L, D] and values [B, Hkv, L, D]; return all so far, views of `length` tokens.

        They must fit: `DecodingState.check_room` has seen to it.
        """
        start, end = self.length, self.length + keys.shape[2]
        if start == 0:
            self._keys, self._values = (
                one.new_empty(*one.shape[:2], self.max_tokens, one.shape[3]) for one in (keys, values)
            )
        self._keys[:, :, start:end] = keys
        self._values[:, :, start:end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


@dataclass
class RecurrentState:
    """What a mixer keeps of all tokens it has seen, in tensors whose size does not grow; empty before the first call.

    The tensors are the mixer's own business. A mixer that needs nothing of the past leaves it empty.
    """

    tensors: tuple[Tensor, ...] = ()


LayerCache = KVCache | RecurrentState


@dataclass
class DecodingState:
    """One cache per layer, room for `max_tokens` tokens, and the number already processed: the next one's position."""

    layers: list[LayerCache]
    max_tokens: int
    length: int = 0

    def check_room(self, tokens: int) -> None:
        """Raise ValueError when `tokens` more do not fit."""
        if self.length + tokens > self.max_tokens:
            raise ValueError(
                f"the decoding cache has room for {self.max_tokens} tokens and {self.length + tokens} were given; "
                "make it with Transformer.new_cache(max_tokens) for as many as will be decoded"
            )
