"""A decoder-only transformer: pre-norm blocks of a token mixer and a SwiGLU MLP, RMSNorm, RoPE, no biases."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import DecodingState, KVCache
from model.config import ModelConfig
from model.initialisation import initialise_weights
from model.layers import Embedding, Linear, RMSNorm, SwiGLU
from model.mixers import build_mixer
from model.rope import Rope, rope_tables


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); x [B, L, hidden]."""

    def __init__(self, config: ModelConfig, kernel: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = build_mixer(config, kernel)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor, rope: Rope, cache: KVCache | None = None) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), rope, cache)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Transformer(nn.Module):
    """The language model of `config` over `vocab_size` tokens, initialised from `seed` without touching global RNG.

    kernel: backend of Lazy Attention (auto, reference, blockwise, triton); it changes speed and rounding only.
    On the meta device the weights stay unmade, for counting and for loading a checkpoint into.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0, kernel: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.embedding = Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernel) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, vocab_size)
        if self.embedding.weight.device.type != "meta":
            initialise_weights(self, config, seed)

    def forward(self, tokens: Tensor, cache: DecodingState | None = None) -> Tensor:
        """Next-token logits float32 [B, L, vocab_size] of tokens int64 [B, L].

        With a cache from `new_cache`, the tokens continue those given before and the cache is extended.
        """
        x, rope = self._embed(tokens, 0 if cache is None else cache.length)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, None if cache is None else cache.layers[index])
        if cache is not None:
            cache.length += tokens.shape[1]
        matrix = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(self.final_norm(x), matrix).float()

    def new_cache(self, max_tokens: int) -> DecodingState:
        """An empty cache for decoding at most `max_tokens` tokens, the prompt included."""
        return DecodingState([layer.mixer.new_cache(max_tokens) for layer in self._blocks()])

    @torch.no_grad()
    def attention_rows(self, tokens: Tensor, query_block: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (layer, query_start, weights [B, H, rows, L] float32), layer by layer, `query_block` rows at a time.

        The weights are those each layer really multiplies with V: exact zeros included, future positions 0.
        """
        x, rope = self._embed(tokens, 0)
        for index, layer in enumerate(self._blocks()):
            for start, weights in layer.mixer.attention_rows(layer.mixer_norm(x), rope, query_block):
                yield index, start, weights
            x = layer(x, rope)

    @torch.no_grad()
    def sparsity_by_layer(self, tokens: Tensor) -> list[float] | None:
        """Share of exactly-zero attention weights of each layer on tokens [B, L]; None for mixers that have none.

        Costs a forward pass with every attention computed twice.
        """
        x, rope = self._embed(tokens, 0)
        shares = []
        for layer in self._blocks():
            share = layer.mixer.sparsity(layer.mixer_norm(x), rope)
            if share is None:
                return None
            shares.append(float(share.mean()))
            x = layer(x, rope)
        return shares

    def _blocks(self) -> Iterator[Block]:
        for layer in self.layers:
            assert isinstance(layer, Block)
            yield layer

    def _embed(self, tokens: Tensor, first_position: int) -> tuple[Tensor, Rope]:
        config = self.config
        rope = rope_tables(first_position, tokens.shape[1], config.head_dim, config.rope_theta, tokens.device)
        return self.embedding(tokens), rope


def count_parameters(model: Transformer) -> tuple[int, int]:
    """(all parameters, those outside the input and output embeddings). A tied matrix is counted once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.embedding.weight.numel() * (1 if model.head is None else 2)
    return total, total - embeddings
