"""What incremental decoding remembers between calls."""

from dataclasses import dataclass

import torch
from torch import Tensor


class KVCache:
    """Rotated keys and values of the tokens one layer has seen. Room for `max_tokens` is taken at the first call."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.length = 0
        self._keys = self._values = torch.empty(0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, Hkv, L, D] keys and values; return all so far, [B, Hkv, length, D] views.

        Raises ValueError when they do not fit.
        """
        start, end = self.length, self.length + keys.shape[2]
        if end > self.max_tokens:
            raise ValueError(
                f"the KV cache has room for {self.max_tokens} tokens and {end} were given; "
                "make it with Transformer.new_cache(max_tokens) for as many as will be decoded"
            )
        if start == 0:
            batch_size, kv_heads, _, head_dim = keys.shape
            self._keys = keys.new_empty(batch_size, kv_heads, self.max_tokens, head_dim)
            self._values = torch.empty_like(self._keys)
        self._keys[:, :, start:end] = keys
        self._values[:, :, start:end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


@dataclass
class DecodingState:
    """One cache per layer and the number of tokens already processed, which is the position of the next one."""

    layers: list[KVCache]
    length: int = 0
