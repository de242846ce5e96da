"""A decoder-only transformer: pre-norm blocks of a token mixer and a SwiGLU MLP, RMSNorm, RoPE, no biases."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.activation_checkpointing import checkpointed
from model.cache import DecodingState, LayerCache
from model.config import WITH_SIDE_SEQUENCE, WITHOUT_ATTENTION, ModelConfig
from model.documents import Documents
from model.initialisation import initialise_weights
from model.layers import Embedding, Linear, RMSNorm, SwiGLU
from model.mixers import SideInputs, SideQKAttention, build_mixer
from model.rope import Rope, rope_tables
from model.side_sequence import Maps, SideSequence


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); x [B, L, hidden]."""

    def __init__(self, config: ModelConfig, index: int, kernel: str) -> None:
        super().__init__()
        self.index = index
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = build_mixer(config, config.layer_mixers[index], kernel)
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
        side.maps = side.maps_by_layer.get(self.index)
        normed: Tensor = self.mixer_norm(x)
        return normed


class Transformer(nn.Module):
    """The language model of `config` over `vocab_size` tokens, initialised from `seed` without touching global RNG.

    kernel: backend of Lazy Attention (auto, reference, blockwise, triton); it changes speed and rounding only.
    On the meta device the weights stay unmade, for counting and for loading a checkpoint into.

    activation_checkpointing: what of the blocks the backward pass computes again (activation_checkpointing.py).
    """

    activation_checkpointing: Literal["none", "block", "selective"] = "none"

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0, kernel: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.embedding = Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index, kernel) for index in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, vocab_size)
        self.side = SideSequence(config) if config.mixer in WITH_SIDE_SEQUENCE else None
        if self.embedding.weight.device.type != "meta":
            initialise_weights(self, config, seed)

    def forward(
        self,
        tokens: Tensor,
        cache: DecodingState | None = None,
        cu_seqlens: Tensor | None = None,
        head_mass: list[Tensor] | None = None,
    ) -> Tensor:
        """Next-token logits float32 [B, L, vocab_size] of tokens int64 [B, L].

        cache       from `new_cache`: the tokens continue those given before and the cache is extended.
        cu_seqlens  int32 [N + 1], 0 = first < ... < last = L, beside tokens [1, L]: N documents one after the other.
                    Each is treated as if it were alone: nothing attends across, positions count inside it.
        head_mass   gets what `model.loss.head_balance` takes: Imp [H] of every layer of `sink`.

        Raises ValueError for a cache without room, for cu_seqlens that do not fit, and for the two together.
        """
        return self.logits(self.hidden(tokens, cache, cu_seqlens, head_mass))

    def hidden(
        self,
        tokens: Tensor,
        cache: DecodingState | None = None,
        cu_seqlens: Tensor | None = None,
        head_mass: list[Tensor] | None = None,
    ) -> Tensor:
        """What the output matrix is applied to, [B, L, hidden]: for whoever needs the logits of some positions only.

        Arguments and errors are those of `forward`.
        """
        if cache is not None:
            if cu_seqlens is not None:
                raise ValueError("a decoding cache holds one document per row; give either cache or cu_seqlens")
            cache.check_room(tokens.shape[1])
        x, rope, side = self.enter(tokens, 0 if cache is None else cache.length, cu_seqlens)
        side.head_mass = head_mass
        for index, layer in enumerate(self._blocks()):
            x = self._through(layer, x, rope, None if cache is None else cache.layers[index], side)
        if cache is not None:
            cache.length += tokens.shape[1]
        out: Tensor = self.final_norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., vocab_size] of rows [..., hidden] of `hidden`."""
        return F.linear(hidden, self.output_matrix).float()

    @property
    def output_matrix(self) -> Tensor:
        """[vocab_size, hidden]: the embedding's where the two are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_cache(self, max_tokens: int) -> DecodingState:
        """An empty cache for decoding at most `max_tokens` tokens, the prompt included."""
        return DecodingState([layer.mixer.new_cache(max_tokens) for layer in self._blocks()], max_tokens)

    @torch.no_grad()
    def attention_rows(
        self, tokens: Tensor, query_block: int, cu_seqlens: Tensor | None = None
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (layer, query_start, weights [B, H, rows, L] float32), layer by layer, `query_block` rows at a time.

        The weights are those each layer really multiplies with V: exact zeros included, future positions 0, and with
        cu_seqlens (as in `forward`) those of other documents. Layers without attention weights (`attention_layers`
        lacks them) yield nothing.
        """
        x, rope, side = self.enter(tokens, cu_seqlens=cu_seqlens)
        for index, layer in enumerate(self._blocks()):
            for start, weights in layer.mixer.attention_rows(layer.mixer_input(x, side), rope, query_block, side) or ():
                yield index, start, weights.expand(tokens.shape[0], -1, -1, -1)  # a map may serve all rows
            x = layer(x, rope, None, side)

    @property
    def attention_layers(self) -> list[int]:
        """The layers, from 0, that have attention weights."""
        return [index for index, name in enumerate(self.config.layer_mixers) if name not in WITHOUT_ATTENTION]

    @torch.no_grad()
    def sparsity_by_layer(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> list[float | None] | None:
        """Share of exactly-zero attention weights of each layer on tokens [B, L], None for mixers that can have none.

        Of the pairs inside a document, with cu_seqlens as in `forward`. None when no layer can have any. Costs a
        forward pass with every such attention computed twice.
        """
        x, rope, side = self.enter(tokens, cu_seqlens=cu_seqlens)
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

    def enter(
        self, tokens: Tensor, first_position: int = 0, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Rope, SideInputs]:
        """What the first layer is given for tokens [B, L] that start at `first_position`: (x, rope, side inputs)."""
        documents = None if cu_seqlens is None else Documents.packed(cu_seqlens, tokens)
        end = first_position + tokens.shape[1] if documents is None else max(documents.lengths)
        x: Tensor = self.embedding(tokens)
        rope = self._rope(first_position, end)
        if documents is not None:
            rope = rope[0][documents.positions], rope[1][documents.positions]
        if self.side is None:
            return x, rope, SideInputs(x, documents)
        self.side.check_length(end)
        maps = self.side.maps(self, end, self._side_maps)
        here = slice(first_position, end) if documents is None else documents.positions
        at_tokens = {layer: (queries[:, :, here], keys[:, :, here]) for layer, (queries, keys) in maps.items()}
        return x, rope, SideInputs(x, documents, maps_by_layer=at_tokens)

    def _side_maps(self, length: int) -> dict[int, Maps]:
        """Carry the side sequence through the stack; queries and keys of each layer that reads them."""
        assert self.side is not None
        x = self.side.embed(self.embedding, length)
        rope, found = self._rope(0, length), dict[int, Maps]()
        side = SideInputs(x, maps_by_layer=found)
        last = max(block.index for block in self._blocks() if block.mixer.reads_side_sequence)
        for block in self._blocks():
            if isinstance(block.mixer, SideQKAttention):
                found[block.index] = Maps(*block.mixer.side_maps(block.mixer_norm(x), rope))
            if block.index == last:
                break
            x = self._through(block, x, rope, None, side)
        return found

    def _through(self, block: Block, x: Tensor, rope: Rope, cache: LayerCache | None, side: SideInputs) -> Tensor:
        """block(x, rope, cache, side), checkpointed where asked for and a backward pass may come."""
        if self.activation_checkpointing == "none" or cache is not None or not torch.is_grad_enabled():
            out: Tensor = block(x, rope, cache, side)
            return out
        return checkpointed(block, block.mixer, x, rope, side, self.activation_checkpointing == "selective")

    def _rope(self, start: int, end: int) -> Rope:
        config = self.config
        return rope_tables(start, end - start, config.head_dim, config.rope_theta, self.embedding.weight.device)


def count_parameters(model: Transformer) -> tuple[int, int]:
    """(all parameters, those outside the input and output embeddings). A tied matrix is counted once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.embedding.weight.numel() * (1 if model.head is None else 2)
    return total, total - embeddings
