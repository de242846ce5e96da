"""A decoder-only transformer: pre-norm blocks of a token mixer and a SwiGLU MLP, RMSNorm, RoPE, no biases."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lazypipe.model.activation_checkpointing import checkpointed
from lazypipe.model.cache import DecodingState, LayerCache
from lazypipe.model.config import ModelConfig
from lazypipe.model.layers import Embedding, Linear, RMSNorm, SwiGLU, initialise_weights
from lazypipe.model.mixers.base import BlockInputs, BlockOutputs, TokenMixer, build_mixer
from lazypipe.model.mixers.registry import mechanism
from lazypipe.model.mixers.side_qk import SideQKAttention
from lazypipe.model.packing import Documents
from lazypipe.model.rope import Rope, rope_tables
from lazypipe.model.side_sequence import Maps, SideSequence

Compiler = str | Callable[..., Any]  # what torch.compile takes as its backend
Checkpointing = Literal["none", "block", "selective"]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); x [B, L, hidden].

    activation_checkpointing and compiler, set by `Transformer.prepare_training`, are about passes that a backward pass
    may follow, and no others.
    """

    activation_checkpointing: Checkpointing = "none"
    compiler: Compiler | None = None

    def __init__(self, config: ModelConfig, index: int, kernel: str) -> None:
        super().__init__()
        self.index = index
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = build_mixer(config, config.layer_mixers[index], kernel)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor, inputs: BlockInputs, cache: LayerCache | None = None) -> BlockOutputs:
        if cache is not None or not torch.is_grad_enabled():
            return self._apply_to(x, inputs, cache)
        if self.compiler is None:
            return self._in_training(x, inputs)
        return _compiled(self.compiler)(self, x, inputs)

    def _in_training(self, x: Tensor, inputs: BlockInputs) -> BlockOutputs:
        if self.activation_checkpointing == "none":
            return self._apply_to(x, inputs)
        if not self.mixer.reads_values:  # or they would be kept for the backward pass
            inputs = inputs._replace(values=None)
        return checkpointed(self._apply_to, x, inputs, self.activation_checkpointing == "selective")

    def _apply_to(self, x: Tensor, inputs: BlockInputs, cache: LayerCache | None = None) -> BlockOutputs:
        mixed = self.mixer(*self.mixer_inputs(x, inputs), cache)
        x = x + mixed.x
        x = x + self.mlp(self.mlp_norm(x))
        return BlockOutputs(x, mixed.values, mixed.head_mass)

    def statistics(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor | None, Tensor | None]:
        """The mixer's `statistics` on x, mean over heads: (sparsity, sink), [] float32 each."""
        sparsity, sink = self.mixer.statistics(*self.mixer_inputs(x, inputs))
        return None if sparsity is None else sparsity.mean(), None if sink is None else sink.mean()

    def mixer_inputs(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, BlockInputs]:
        """What the mixer is given: x through the input norm and, where it reads them, the embeddings likewise."""
        if self.mixer.reads_embeddings and inputs.embeddings is not None:
            inputs = inputs._replace(embeddings=self.mixer_norm(inputs.embeddings))
        return self.mixer_norm(x), inputs


@functools.cache
def _compiled(compiler: Compiler) -> Callable[[Block, Tensor, BlockInputs], BlockOutputs]:
    """One function for all blocks, so that blocks of one kind share what is compiled."""
    return torch.compile(Block._in_training, backend=compiler)


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
        self.layers = nn.ModuleList(Block(config, index, kernel) for index in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, vocab_size)
        self.side = None if config.mechanism.side_sequence is None else SideSequence(config)
        if self.embedding.weight.device.type != "meta":
            initialise_weights(self.named_modules(), seed, config.init_std, config.num_layers)

    def forward(self, tokens: Tensor, cache: DecodingState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Next-token logits float32 [B, L, vocab_size] of tokens int64 [B, L].

        cache       from `new_cache`: the tokens continue those given before and the cache is extended.
        cu_seqlens  int32 [N + 1], 0 = first < ... < last = L, beside tokens [1, L]: N documents one after the other.
                    Each is treated as if it were alone: nothing attends across, positions count inside it.

        Raises ValueError for a cache without room, for cu_seqlens that do not fit, and for the two together.
        """
        return self.logits(self.hidden(tokens, cache, cu_seqlens))

    def hidden(self, tokens: Tensor, cache: DecodingState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """What the output matrix is applied to, [B, L, hidden]: for whoever needs the logits of some positions only.

        Arguments and errors are those of `forward`.
        """
        return self._through_blocks(tokens, cache, cu_seqlens, False)[0]

    def hidden_and_head_mass(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """`hidden`, and what `model.loss.head_balance` takes: Imp [H] of every layer of `sink`, with gradient."""
        return self._through_blocks(tokens, None, cu_seqlens, True)

    def _through_blocks(
        self, tokens: Tensor, cache: DecodingState | None, cu_seqlens: Tensor | None, returns_head_mass: bool
    ) -> tuple[Tensor, list[Tensor]]:
        if cache is not None:
            if cu_seqlens is not None:
                raise ValueError("a decoding cache holds one document per row; give either cache or cu_seqlens")
            cache.check_room(tokens.shape[1])
        x, inputs, maps = self.enter(tokens, 0 if cache is None else cache.length, cu_seqlens)
        inputs = inputs._replace(returns_head_mass=returns_head_mass)
        head_mass: list[Tensor] = []
        for index, block in enumerate(self._blocks()):
            inputs = inputs._replace(maps=maps.get(index))
            outputs = block(x, inputs, None if cache is None else cache.layers[index])
            x, inputs = outputs.x, inputs.above(outputs)
            if outputs.head_mass is not None:
                head_mass.append(outputs.head_mass)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.final_norm(x), head_mass

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., vocab_size] of rows [..., hidden] of `hidden`."""
        return F.linear(hidden, self.output_matrix).float()

    def prepare_training(
        self, activation_checkpointing: Checkpointing = "none", compiler: Compiler | None = None
    ) -> None:
        """How blocks compute where a backward pass may follow; neither changes what, but for rounding.

        activation_checkpointing  what the backward pass computes again; see model/activation_checkpointing.py.
        compiler                  torch.compile with this backend, "inductor" for torch's own, each block by itself:
                                  blocks of one kind share their code. None: not compiled. torch keeps eight graphs
                                  per process; before a model of other blocks call `torch.compiler.reset`.
        """
        for block in self._blocks():
            block.activation_checkpointing = activation_checkpointing
            block.compiler = compiler

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
        x, inputs, maps = self.enter(tokens, cu_seqlens=cu_seqlens)
        for index, block in enumerate(self._blocks()):
            inputs = inputs._replace(maps=maps.get(index))
            for start, weights in block.mixer.attention_rows(*block.mixer_inputs(x, inputs), query_block) or ():
                yield index, start, weights.expand(tokens.shape[0], -1, -1, -1)  # a map may serve all rows
            outputs = block(x, inputs)
            x, inputs = outputs.x, inputs.above(outputs)

    @property
    def attention_layers(self) -> list[int]:
        """The layers, from 0, that have attention weights."""
        return [index for index, name in enumerate(self.config.layer_mixers) if mechanism(name).has_weights]

    @torch.no_grad()
    def statistics_by_layer(
        self, tokens: Tensor, cu_seqlens: Tensor | None = None
    ) -> list[tuple[float | None, float | None]]:
        """(share of exactly-zero weights, mean weight on the first key) of each layer on tokens [B, L].

        Of the pairs and the first key inside a document, with cu_seqlens as in `forward`. None for what a mixer does
        not have. Costs a forward pass with every attention computed once or twice more.
        """
        x, inputs, maps = self.enter(tokens, cu_seqlens=cu_seqlens)
        measured: list[tuple[Tensor | None, Tensor | None]] = []
        for index, block in enumerate(self._blocks()):
            inputs = inputs._replace(maps=maps.get(index))
            measured.append(block.statistics(x, inputs))
            outputs = block(x, inputs)
            x, inputs = outputs.x, inputs.above(outputs)
        scalars = [one for pair in measured for one in pair if one is not None] or [x.new_zeros(())]
        values = iter(torch.stack(scalars).tolist())  # one transfer from the GPU
        return [(None if a is None else next(values), None if b is None else next(values)) for a, b in measured]

    @property
    def mixers(self) -> list[TokenMixer]:
        """The token mixer of each layer; none of a baseline."""
        return [block.mixer for block in self._blocks()]

    def _blocks(self) -> Iterator[Block]:
        for layer in self.layers:
            assert isinstance(layer, Block)
            yield layer

    def enter(
        self, tokens: Tensor, first_position: int = 0, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, BlockInputs, Mapping[int, tuple[Tensor, Tensor]]]:
        """What the first layer is given for tokens [B, L] that start at `first_position`: (x, its inputs, maps).

        The maps are those of `BlockInputs.maps` by layer, and not set in the inputs yet.
        """
        documents = None if cu_seqlens is None else Documents.packed(cu_seqlens, tokens)
        end = first_position + tokens.shape[1] if documents is None else max(documents.lengths)
        x: Tensor = self.embedding(tokens)
        rope = self._rope(first_position, end)
        if documents is not None:
            rope = rope[0][documents.positions], rope[1][documents.positions]
        if self.side is None:
            return x, self._first_inputs(x, rope, documents), {}
        self.side.check_length(end)
        maps = self.side.maps(self, end, self._side_maps)
        here = slice(first_position, end) if documents is None else documents.positions
        at_tokens = {layer: (queries[:, :, here], keys[:, :, here]) for layer, (queries, keys) in maps.items()}
        return x, self._first_inputs(x, rope, documents), at_tokens

    def _first_inputs(self, x: Tensor, rope: Rope, documents: Documents | None) -> BlockInputs:
        """Of a pass over embeddings x [B, L, hidden], without what no block reads."""
        return BlockInputs(
            rope,
            documents,
            embeddings=x if any(block.mixer.reads_embeddings for block in self._blocks()) else None,
            returns_values=any(block.mixer.reads_values for block in self._blocks()),
        )

    def _side_maps(self, length: int) -> dict[int, Maps]:
        """Carry the side sequence through the stack; queries and keys of each layer that reads them."""
        assert self.side is not None
        x = self.side.embed(self.embedding, length)
        maps: dict[int, Maps] = {}
        inputs = self._first_inputs(x, self._rope(0, length), None)
        last = max(block.index for block in self._blocks() if block.mixer.reads_side_sequence)
        for block in self._blocks():
            if isinstance(block.mixer, SideQKAttention):
                maps[block.index] = Maps(*block.mixer.side_maps(block.mixer_norm(x), inputs.rope))
            if block.index == last:
                break
            outputs = block(x, inputs._replace(maps=maps.get(block.index)))
            x, inputs = outputs.x, inputs.above(outputs)
        return maps

    def _rope(self, start: int, end: int) -> Rope:
        config = self.config
        return rope_tables(start, end - start, config.head_dim, config.rope_theta, self.embedding.weight.device)


def count_parameters(model: Transformer) -> tuple[int, int]:
    """(all parameters, those outside the input and output embeddings). A tied matrix is counted once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.embedding.weight.numel() * (1 if model.head is None else 2)
    return total, total - embeddings
