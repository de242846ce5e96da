"""What every token mixer offers, and what those that are attention share."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from lazypipe.model.cache import KVCache, LayerCache
from lazypipe.model.config import ModelConfig
from lazypipe.model.layers import Linear, RMSNorm
from lazypipe.model.mixers.registry import mechanism
from lazypipe.model.packing import Documents, first_key_mass, weight_rows
from lazypipe.model.rope import Rope, apply_rope

STATISTICS_ROWS = 256  # query rows of weights that exist at a time


class BlockInputs(NamedTuple):
    """What a block and its mixer read beside the residual stream. Immutable: each layer is given its own.

    rope                the tables of exactly the L positions of the input
    documents           where the documents of a packed row lie; None when every row is one document
    embeddings          [B, L, hidden] token embeddings of the input; a mixer with `reads_embeddings` is given them
                        through the input norm of its layer. None where no layer reads them
    values              [B, Hkv, L, D] of the nearest attention layer below, without gradient; None before the first,
                        and where no layer reads them
    maps                rotated queries [1, H, L, D] and keys [1, Hkv, L, D] of the side sequence at this layer, for
                        mixers with `reads_side_sequence`
    returns_values      whether an attention layer is to return its values for the layers above
    returns_head_mass   whether a layer of `sink` is to return its head mass
    """

    rope: Rope
    documents: Documents | None = None
    embeddings: Tensor | None = None
    values: Tensor | None = None
    maps: tuple[Tensor, Tensor] | None = None
    returns_values: bool = False
    returns_head_mass: bool = False

    def above(self, outputs: "BlockOutputs") -> Self:
        """The inputs of the layer above one that was given these and returned `outputs`, but for its own maps."""
        return self if outputs.values is None else self._replace(values=outputs.values)


class BlockOutputs(NamedTuple):
    """What a block returns, and a mixer to its block. A tuple of tensors: FSDP2 and torch.compile follow each of them.

    x          [B, L, hidden]: of a block the residual stream, of a mixer what is added to it
    values     [B, Hkv, L, D] without gradient, of an attention layer asked with `BlockInputs.returns_values`
    head_mass  Imp [H] float32, the mean over all tokens of the weight that the real keys have together, with gradient;
               of a layer of `sink` asked with `BlockInputs.returns_head_mass`
    """

    x: Tensor
    values: Tensor | None = None
    head_mass: Tensor | None = None


class TokenMixer(nn.Module):
    """Mixes information between positions, causally. x is the normed layer input [B, L, hidden].

    With `inputs.documents` x is one packed row: positions restart with each document, and nothing is mixed across.
    The projection back into the residual stream is a Linear with into_residual (its initialisation is scaled down with
    depth). A mixer with parameters of its own fills them in a method `initialise(draw)` (see `layers.Draw`).
    """

    reads_embeddings: ClassVar[bool] = False
    reads_side_sequence: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False  # of the attention layer below

    kernel: str = "auto"  # backend of lazypipe.kernels, for a mixer that one of them computes

    undecayed: ClassVar[tuple[str, ...]] = ()  # names of own parameters that AdamW does not decay
    own_rate: ClassVar[tuple[str, ...]] = ()  # those of them that learn at lr * pretrain.tau_bias_lr_multiplier

    @abstractmethod
    def forward(self, x: Tensor, inputs: BlockInputs, cache: LayerCache | None = None) -> BlockOutputs:
        """With a cache, x continues the tokens that the cache has seen, and is added to it."""

    @abstractmethod
    def new_cache(self, max_tokens: int) -> LayerCache:
        """An empty decoding cache with room for `max_tokens` tokens."""

    @abstractmethod
    def attention_rows(self, x: Tensor, inputs: BlockInputs, query_block: int) -> Iterator[tuple[int, Tensor]] | None:
        """Yield (query_start, weights [B, H, rows, L] float32) from the first query to the last; None without weights.

        The weights are those multiplied with V: exact zeros included, future positions 0. At most `query_block` rows
        exist at a time.
        """

    def sparsity(self, x: Tensor, inputs: BlockInputs) -> Tensor | None:  # noqa: ARG002
        """Share of exactly-zero weights among all (query, visible key) pairs, [H] float32; None where none can be."""
        return None

    def statistics(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor | None, Tensor | None]:
        """(`sparsity`, sink), [H] float32 each: sink is the mean over queries of the weight on the first key they see.

        None for what a mixer does not have.
        """
        rows = self.attention_rows(x, inputs, STATISTICS_ROWS)
        return self.sparsity(x, inputs), None if rows is None else first_key_mass(rows, inputs.documents)

    def tau_and_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """What it has learned of Lazy Attention's tau [H] or [1] and distance bias [H, W]."""
        return None, None


class ProjectedMixer(TokenMixer):
    """The projections multi-head mixers share: queries, keys and values of the heads, and the way back.

    Grouped-query attention when config.kv_heads < config.num_heads: query head h reads key/value head
    h // (num_heads / kv_heads). With config.qk_norm, each head of Q and of K goes through an RMSNorm before RoPE.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.scale = self.head_dim**-0.5
        self.q_proj = Linear(config.hidden_size, self.num_heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, into_residual=True)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def unrotated(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, L, D] and keys [B, Hkv, L, D] of source [B, L, hidden], normed if configured, before RoPE."""
        q = self._heads(self.q_proj(source), self.num_heads)
        k = self._heads(self.k_proj(source), self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k

    def new_values(self, x: Tensor) -> Tensor:
        """Values [B, Hkv, L, D] of x."""
        return self._heads(self.v_proj(x), self.kv_heads)

    def returned_values(self, v: Tensor, inputs: BlockInputs) -> Tensor | None:
        """The new values v as `BlockOutputs.values`: without gradient, None where nobody asks for them."""
        # Cloned: torch 2.13's compiler fails on a graph that gives out v and a view of v.
        return v.detach().clone() if inputs.returns_values else None

    def project(self, heads: Tensor) -> Tensor:
        """Head outputs [B, H, L, D] back into the residual stream, [B, L, hidden]."""
        out: Tensor = self.o_proj(heads.transpose(1, 2).flatten(2))
        return out

    def per_query_head(self, x: Tensor) -> Tensor:
        """Keys or values [B, Hkv, L, D] as every query head sees them, [B, H, L, D]."""
        return x if self.kv_heads == self.num_heads else x.repeat_interleave(self.num_heads // self.kv_heads, dim=1)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)


class AttentionMixer(ProjectedMixer):
    """Multi-head attention around two functions a subclass gives: the output of all queries, the weights of a few."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, Lq, D] against k, v [B, Hkv, Lk, D]: output [B, H, Lq, D]. The queries are the last Lq positions."""

    @abstractmethod
    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The weights [B, H, Lq, Lk] float32 that `attend` multiplies with V."""

    def forward(self, x: Tensor, inputs: BlockInputs, cache: LayerCache | None = None) -> BlockOutputs:
        q, k = self.queries_and_keys(x, inputs)
        v = self.new_values(x)
        values = self.returned_values(v, inputs)
        if cache is not None:
            assert isinstance(cache, KVCache)
            k, v = cache.append(k, v)
        return BlockOutputs(self.project(self.attend_documents(q, k, v, inputs.documents)), values)

    def new_cache(self, max_tokens: int) -> LayerCache:
        return KVCache(max_tokens)

    def attention_rows(self, x: Tensor, inputs: BlockInputs, query_block: int) -> Iterator[tuple[int, Tensor]]:
        q, k = self.queries_and_keys(x, inputs)

        def weights_of(start: int, end: int, first_key: int) -> Tensor:
            return self.weights(q[:, :, start:end], k[:, :, first_key:end])

        return weight_rows(weights_of, q.shape[2], query_block, inputs.documents)

    def attend_documents(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """`attend`, within each document of a packed row."""
        return self.attend(q, k, v) if documents is None else documents.each(self.attend, q, k, v)

    def queries_and_keys(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, H, L, D] and keys [B, Hkv, L, D] of x; a subclass may form them of other inputs."""
        q, k = self.unrotated(x)
        return apply_rope(q, inputs.rope), apply_rope(k, inputs.rope)

    def by_weights(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output of `attend` by way of `weights`."""
        return self.weights(q, k).to(v.dtype) @ self.per_query_head(v)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q . k / sqrt(D) in float32, autocast or not, [B, H, Lq, Lk], before any mask."""
        keys = self.per_query_head(k.float())
        with torch.autocast(q.device.type, enabled=False):
            scores: Tensor = (q.float() * self.scale) @ keys.transpose(-1, -2)
        return scores


def build_mixer(config: ModelConfig, name: str, kernel: str = "auto") -> TokenMixer:
    """The token mixer of one layer, uninitialised. kernel: backend of a mixer that lazypipe.kernels computes.

    Raises ValueError for a baseline, which is no mixer.
    """
    row = mechanism(name)
    if row.whole_model:
        raise ValueError(f"{name} is a whole model and no mixer; build it with lazypipe.model.baselines.build_model")
    mixer: TokenMixer = row.load()(config)
    mixer.kernel = kernel
    return mixer
