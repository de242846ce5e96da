"""A decoder-only transformer: pre-norm blocks of a token mixer and a SwiGLU MLP, RMSNorm, RoPE, no biases."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import DecodingState, LayerCache
from model.config import WITHOUT_ATTENTION, MixerName, ModelConfig
from model.initialisation import initialise_weights
from model.layers import Embedding, Linear, RMSNorm, SwiGLU
from model.mixers import SideInputs, build_mixer
from model.rope import Rope, rope_tables


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); x [B, L, hidden]."""

    def __init__(self, config: ModelConfig, mixer: MixerName, kernel: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = build_mixer(config, mixer, kernel)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None, side: SideInputs) -> Tensor:
        x = x + self.mixer(self.mixer_input(x, side), rope, cache, side)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out

    def mixer_input(self, x: Tensor, side: SideInputs) -> Tensor:
        """The normed x; the side inputs are made ready for the mixer too."""
        if self.mixer.reads_embeddings:
            side.normed_embeddings = self.mixer_norm(side.embeddings)
        normed: Tensor = self.mixer_norm(x)
        return normed


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
        self.layers = nn.ModuleList(Block(config, mixer, kernel) for mixer in config.layer_mixers)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, vocab_size)
        if self.embedding.weight.device.type != "meta":
            initialise_weights(self, config, seed)

    def forward(self, tokens: Tensor, cache: DecodingState | None = None) -> Tensor:
        """Next-token logits float32 [B, L, vocab_size] of tokens int64 [B, L].

        With a cache from `new_cache`, the tokens continue those given before and the cache is extended.
        """
        if cache is not None:
            cache.check_room(tokens.shape[1])
        x, rope = self._embed(tokens, 0 if cache is None else cache.length)
        side = SideInputs(x)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, None if cache is None else cache.layers[index], side)
        if cache is not None:
            cache.length += tokens.shape[1]
        matrix = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(self.final_norm(x), matrix).float()

    def new_cache(self, max_tokens: int) -> DecodingState:
        """An empty cache for decoding at most `max_tokens` tokens, the prompt included."""
        return DecodingState([layer.mixer.new_cache(max_tokens) for layer in self._blocks()], max_tokens)

    @torch.no_grad()
    def attention_rows(self, tokens: Tensor, query_block: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (layer, query_start, weights [B, H, rows, L] float32), layer by layer, `query_block` rows at a time.

        The weights are those each layer really multiplies with V: exact zeros included, future positions 0. Layers
        without attention weights (`attention_layers` lacks them) yield nothing.
        """
        x, rope = self._embed(tokens, 0)
        side = SideInputs(x)
        for index, layer in enumerate(self._blocks()):
            for start, weights in layer.mixer.attention_rows(layer.mixer_input(x, side), rope, query_block, side) or ():
                yield index, start, weights
            x = layer(x, rope, None, side)

    @property
    def attention_layers(self) -> list[int]:
        """The layers, from 0, that have attention weights."""
        return [index for index, name in enumerate(self.config.layer_mixers) if name not in WITHOUT_ATTENTION]

    @torch.no_grad()
    def sparsity_by_layer(self, tokens: Tensor) -> list[float | None] | None:
        """Share of exactly-zero attention weights of each layer on tokens [B, L], None for mixers that can have none.

        None when no layer can have any. Costs a forward pass with every such attention computed twice.
        """
        x, rope = self._embed(tokens, 0)
        side = SideInputs(x)
        shares: list[float | None] = []
        for layer in self._blocks():
            share = layer.mixer.sparsity(layer.mixer_input(x, side), rope, side)
            shares.append(None if share is None else float(share.mean()))
            x = layer(x, rope, None, side)
        return shares if any(share is not None for share in shares) else None

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
