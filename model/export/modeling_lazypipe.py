"""A language model exported by lazypipe, in plain torch: pre-norm blocks of a token mixer and a SwiGLU MLP, RoPE.

Self-contained: needs torch and transformers alone. The mixers, in the notation of the papers (H: the layer's normed
input, d: width of a head, n_i: the number of tokens query i sees):

    standard    softmax(Q K^T / sqrt(d)) V
    lazy        max(softmax(Q K^T / sqrt(d) + bias[i - j]) + tau / n_i, 0) V         (arXiv 2601.00919)
    mlp         W_down(SiLU(H W_gate) * (H W_up)), no token mixing                   (arXiv 2510.11602, as those below)
    taylor      weights 1 + s + s^2 / 2, normalised; a state of constant size when decoding
    gating      softmax over scores of the keys alone; a state of constant size when decoding
    random_qk   softmax attention, Q and K from a fixed sequence of random vectors, V from H
    text_qk     the same with a fixed text
    static_qk   softmax attention, Q and K from the token embeddings, V from H

Padding: whatever `attention_mask` [batch, tokens seen so far] marks 0 is left out and counts for no position, so a
padded row gives what it gives alone. Positions come from the mask; there are no position_ids.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_lazypipe import SIDE_SEQUENCES, LazypipeConfig

ROWS = 256  # queries whose weights exist at a time
CHUNK = 128  # tokens between two states of taylor
NEVER = -1e30  # score of a padded key; finite, for -inf minus -inf is no number

Maps = tuple[Tensor, Tensor]


class LayerState(CacheLayerMixin):  # type: ignore[misc]
    """What one layer remembers of the tokens before: tensors with the batch as first dimension, keys or a state."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: tuple[Tensor, ...] = ()
        self.length = 0

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Lengthen the tensors [B, heads, L, D] along L; returns all so far."""
        if self.tensors:
            new = tuple(torch.cat(pair, dim=-2) for pair in zip(self.tensors, new, strict=True))
        self.tensors = new
        return new

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first tokens bring the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.append(key_states, value_states)
        return keys, values

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.tensors, self.length = (), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.tensors = tuple(tensor.index_select(0, beam_idx.to(tensor.device)) for tensor in self.tensors)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.tensors = tuple(tensor.repeat_interleave(repeats, dim=0) for tensor in self.tensors)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.tensors = tuple(tensor[indices] for tensor in self.tensors)


class LazypipeCache(Cache):  # type: ignore[misc]
    """A `LayerState` per layer, and which of the tokens seen are padding (real: bool [B, length], None without)."""

    def __init__(self, config: LazypipeConfig) -> None:
        super().__init__(layers=[LayerState() for _ in range(config.num_hidden_layers)])
        self.real: Tensor | None = None

    def advance(self, real: Tensor | None, new: int) -> None:
        """Count `new` more tokens in."""
        self.real = real
        for layer in self.layers:
            layer.length += new

    def reset(self) -> None:
        super().reset()
        self.real = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.real = None if self.real is None else self.real.index_select(0, beam_idx.to(self.real.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.real = None if self.real is None else self.real.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.real = None if self.real is None else self.real[indices]


class Layout:
    """Where the new tokens stand: `new` of them after `past`, in rows that may hold padding.

    real: bool [B, past + new], None when no row is padded. positions: int64 [R, past + new], R = B if one is, else 1.
    """

    def __init__(self, past: int, new: int, real: Tensor | None, device: torch.device) -> None:
        self.past, self.new, self.real, self.device = past, new, real, device
        if real is None:
            self.positions = torch.arange(past + new, device=device)[None]
        else:
            self.positions = (real.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def new_positions(self) -> Tensor:
        return self.positions[:, self.past :]

    @property
    def new_real(self) -> Tensor | None:
        return None if self.real is None else self.real[:, self.past :]

    def visible(self, start: int, end: int) -> Tensor:
        """Which keys the new queries start ... end - 1 see, bool [R, 1, rows, past + end]. Padding sees itself too."""
        queries = torch.arange(self.past + start, self.past + end, device=self.device)[:, None]
        keys = torch.arange(self.past + end, device=self.device)
        causal = keys <= queries
        if self.real is None:
            return causal[None, None]
        # A row of weights without any key would be no number, and 0 times that is no number in the rows above.
        return ((causal & self.real[:, None, : self.past + end]) | (keys == queries))[:, None]


@dataclass
class Inputs:
    """What a mixer is given beside x and the source of its queries and keys."""

    layout: Layout
    rope: tuple[Tensor, Tensor]
    state: LayerState | None = None
    maps: Maps | None = None


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""


class GatedMLP(nn.Module):
    """down(SiLU(gate(x)) * up(x)): the MLP of every block, and the mixer mlp."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor, source: Tensor | None = None, inputs: Inputs | None = None) -> Tensor:  # noqa: ARG002
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Attention(nn.Module):
    """Multi-head causal softmax attention (standard); the projections all attention-like mixers share."""

    reads_embeddings = False

    def __init__(self, config: LazypipeConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, source: Tensor, inputs: Inputs) -> Tensor:
        """[B, L, hidden] of x [B, L, hidden]; queries and keys are read from source, of the same shape."""
        q, k = self.rotated(source, inputs.rope)
        v = self.split(self.v_proj(x), self.kv_heads)
        if inputs.state is not None:
            k, v = inputs.state.append(k, v)
        return self.join(self.attend(q, k, v, inputs.layout))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """q [B, H, new, D] against k, v [B, Hkv, past + new, D], `ROWS` queries at a time where a mask is needed."""
        grouped = self.heads != self.kv_heads
        if layout.real is None and (layout.past == 0 or layout.new == 1):
            causal = layout.past == 0
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale, enable_gqa=grouped)
        out = []
        for start, end in blocks(layout.new):
            keys = layout.past + end
            block, mask = q[:, :, start:end], layout.visible(start, end)
            out.append(
                F.scaled_dot_product_attention(
                    block, k[:, :, :keys], v[:, :, :keys], attn_mask=mask, scale=self.scale, enable_gqa=grouped
                )
            )
        return torch.cat(out, dim=2)

    def plain(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, L, D] and keys [B, Hkv, L, D] of source, before RoPE."""
        q, k = self.split(self.q_proj(source), self.heads), self.split(self.k_proj(source), self.kv_heads)
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))

    def rotated(self, source: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q, k = self.plain(source)
        return rotate(q, rope), rotate(k, rope)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q . k / sqrt(D), float32 [B, H, Lq, Lk]."""
        with torch.autocast(q.device.type, enabled=False):
            scores: Tensor = (q.float() * self.scale) @ self.per_query_head(k).float().transpose(-1, -2)
        return scores

    def per_query_head(self, x: Tensor) -> Tensor:
        return x if self.heads == self.kv_heads else x.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)

    def join(self, heads: Tensor) -> Tensor:
        out: Tensor = self.o_proj(heads.transpose(1, 2).flatten(2))
        return out


class LazyAttention(Attention):
    """RoPE, a distance bias [H, W] and Elastic-Softmax with offset tau [H]; both float32 whatever the model's dtype."""

    def __init__(self, config: LazypipeConfig) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(self.heads, config.max_bias_length, dtype=torch.float32))
        self.tau = nn.Parameter(torch.full((self.heads,), -1.0, dtype=torch.float32))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        values, window = self.per_query_head(v), self.bias.shape[1]
        out = []
        for start, end in blocks(layout.new):
            keys = layout.past + end
            seen, positions = layout.visible(start, end), layout.new_positions[:, start:end, None]
            distance = positions - layout.positions[:, None, :keys]
            bias = self.bias.float()[:, distance.clamp(0, window - 1)].masked_fill(distance >= window, 0.0)
            scores = self.scores(q[:, :, start:end], k[:, :, :keys]) + bias.transpose(0, 1)
            probs = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
            threshold = self.tau.float()[:, None, None] / (positions[:, None] + 1)
            # A tau above zero would lift the future too, so the mask comes after the max.
            weights = torch.relu(probs + threshold).masked_fill(~seen, 0.0)
            out.append(weights.to(v.dtype) @ values[:, :, :keys])
        return torch.cat(out, dim=2)


class TaylorAttention(Attention):
    """w(s) = 1 + s + s^2 / 2 in place of exp(s): an inner product of 1 + D + D (D + 1) / 2 features of q and of k.

    So the past is a state [B, Hkv, features, D + 1] of sums over keys; all pairs where the input is short and alone.
    """

    def forward(self, x: Tensor, source: Tensor, inputs: Inputs) -> Tensor:
        q, k = self.rotated(source, inputs.rope)
        v, real = self.split(self.v_proj(x), self.kv_heads), inputs.layout.new_real
        values = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        if real is not None:
            values = values * real[:, None, :, None]  # padding adds to neither sum
        before = inputs.state.tensors[0] if inputs.state is not None and inputs.state.tensors else None
        with torch.autocast(q.device.type, enabled=False):
            sums, after = self.running_sums(q.float(), k.float(), values.float(), before, inputs.state is not None)
        if inputs.state is not None and after is not None:
            inputs.state.tensors = (after,)
        return self.join(quotient(sums).to(v.dtype))

    def running_sums(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(sums [B, H, L, D + 1] of weighted values and of weights, the state after if it is to be kept)."""
        batch, length = q.shape[0], q.shape[2]
        grouped = q.reshape(batch, self.kv_heads, -1, length, self.head_dim)
        features = 1 + self.head_dim + self.head_dim * (self.head_dim + 1) // 2
        chunk = length if not keep and length <= 1.4 * features else CHUNK  # above that the state is the faster way
        out = []
        for start in range(0, length, chunk):
            q_part, k_part, v_part = (t[..., start : start + chunk, :] for t in (grouped, k, v))
            inside = (q_part * self.scale) @ k_part[:, :, None].transpose(-1, -2)
            sums = (1 + inside + 0.5 * inside.square()).tril() @ v_part[:, :, None]
            if state is not None:
                sums = sums + self.expand(q_part) @ state[:, :, None]
            out.append(sums)
            if keep or start + chunk < length:
                added = self.expand(k_part).transpose(-1, -2) @ v_part
                state = added if state is None else state + added
        return torch.cat(out, dim=3).flatten(1, 2), state

    def expand(self, x: Tensor) -> Tensor:
        """Features [..., features] of x [..., D], so that expand(q) . expand(k) = w(q . k / sqrt(D))."""
        x = x * self.scale**0.5
        first, second = torch.triu_indices(self.head_dim, self.head_dim, device=x.device)
        factor = torch.where(first == second, 0.5**0.5, 1.0)
        return torch.cat((torch.ones_like(x[..., :1]), x, x[..., first] * x[..., second] * factor), dim=-1)


class GatingMixer(Attention):
    """sum_{j<=i} exp(e_j) v_j / sum_{j<=i} exp(e_j), e_j = sum_c SiLU(h_j W_Q)_c (h_j W_K)_c / sqrt(D); no position."""

    def forward(self, x: Tensor, source: Tensor, inputs: Inputs) -> Tensor:
        q, k = self.plain(source)
        v = self.per_query_head(self.split(self.v_proj(x), self.kv_heads))
        real, state = inputs.layout.new_real, inputs.state
        maxima = (F.silu(q.float()) * self.per_query_head(k).float()).sum(-1) * self.scale
        sums = torch.cat((v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)), dim=-1)
        # In value exp(0) = 1; the gradient of the scores goes through it.
        sums = sums * torch.exp(maxima - maxima.detach())[..., None]
        maxima = maxima.detach()
        if real is not None:
            maxima = maxima.masked_fill(~real[:, None], NEVER)
            sums = sums * real[:, None, :, None]
        if state is not None and state.tensors:
            maxima, sums = torch.cat((state.tensors[0], maxima), dim=2), torch.cat((state.tensors[1], sums), dim=2)
        maxima, sums = running(maxima, sums)
        if state is not None:
            state.tensors = (maxima[:, :, -1:], sums[:, :, -1:])
        return self.join(quotient(sums[:, :, -x.shape[1] :]).to(v.dtype))


class SideAttention(Attention):
    """random_qk and text_qk: queries and keys of the side sequence at the tokens' positions, one map for all rows."""

    def forward(self, x: Tensor, source: Tensor, inputs: Inputs) -> Tensor:  # noqa: ARG002
        assert inputs.maps is not None
        layout, (queries, keys) = inputs.layout, inputs.maps
        v = self.split(self.v_proj(x), self.kv_heads)
        if inputs.state is not None:
            (v,) = inputs.state.append(v)
        # [1, H, max, D] at positions [R, L]: [H, R, L, D], and the rows in front
        q = queries[0][:, layout.new_positions].transpose(0, 1).expand(x.shape[0], -1, -1, -1)
        k = keys[0][:, layout.positions].transpose(0, 1).expand(x.shape[0], -1, -1, -1)
        return self.join(self.attend(q, k, v, layout))


class EmbeddingAttention(Attention):
    """static_qk: queries and keys of the token embeddings, under the norm of the layer's input."""

    reads_embeddings = True


class MlpMixer(GatedMLP):
    """mlp: no attention."""

    reads_embeddings = False

    def __init__(self, config: LazypipeConfig) -> None:
        super().__init__(config.hidden_size, config.mixer_intermediate_size)


CLASSES: dict[str, type[Attention | MlpMixer]] = {
    "standard": Attention,
    "lazy": LazyAttention,
    "mlp": MlpMixer,
    "taylor": TaylorAttention,
    "gating": GatingMixer,
    "random_qk": SideAttention,
    "text_qk": SideAttention,
    "static_qk": EmbeddingAttention,
}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LazypipeConfig, index: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = CLASSES[config.layer_mixers[index]](config)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, embeddings: Tensor, inputs: Inputs) -> Tensor:
        normed = self.mixer_norm(x)
        source = self.mixer_norm(embeddings) if self.mixer.reads_embeddings else normed
        x = x + self.mixer(normed, source, inputs)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class SideSequence(nn.Module):
    """The fixed sequence of random_qk (vectors) or text_qk (tokens), `max_position_embeddings` long."""

    vectors: Tensor | None
    tokens: Tensor | None

    def __init__(self, config: LazypipeConfig) -> None:
        super().__init__()
        length, random = config.max_position_embeddings, "random" in map(SIDE_SEQUENCES.get, config.layer_mixers)
        self.register_buffer("vectors", torch.zeros(length, config.hidden_size) if random else None)
        self.register_buffer("tokens", None if random else torch.zeros(length, dtype=torch.int64))


class LazypipeForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The language model of a `LazypipeConfig`. Float32 logits, next-token loss when labels are given."""

    config_class = LazypipeConfig
    _no_split_modules = ("Block",)
    _tied_weights_keys = {"lm_head.weight": "embedding.weight"}  # noqa: RUF012  (how transformers declares it)
    # Their updates and differences vanish in bfloat16.
    _keep_in_fp32_modules_strict = ("mixer.bias", "mixer.tau")
    _is_stateful = True  # the states of taylor and gating cannot be taken back, as assisted generation wants

    def __init__(self, config: LazypipeConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.final_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.side_layers = [i for i, name in enumerate(config.layer_mixers) if CLASSES[name] is SideAttention]
        self.side = SideSequence(config) if self.side_layers else None
        self._kept_maps: tuple[object, dict[int, Maps]] | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `forward` makes a `LazypipeCache`, which holds states as well as keys."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """For a model made from a configuration; a loaded one brings every tensor."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LazyAttention):
            nn.init.normal_(module.bias, std=1e-3)
            nn.init.constant_(module.tau, -1.0)
        elif isinstance(module, SideSequence) and module.vectors is not None:
            nn.init.normal_(module.vectors, std=0.02)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LazypipeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits float32 [B, L, vocab] of input_ids int64 [B, L], which continue the tokens in past_key_values.

        attention_mask [B, tokens before + L]: 1 for text, 0 for padding. labels [B, L]: position i is trained to
        predict labels[i + 1]; -100 is left out. logits_to_keep: the last so many positions only.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if past_key_values is not None and not isinstance(past_key_values, LazypipeCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; this model continues a LazypipeCache, "
                "as an earlier call with use_cache=True returned it"
            )
        embeddings: Tensor = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values
        if cache is None and use_cache:
            cache = LazypipeCache(self.config)
        layout = self._layout(embeddings, attention_mask, cache)
        maps = self._maps(layout)
        rope, x, hidden = self._rope(layout.new_positions), embeddings, [embeddings]
        for index, layer in enumerate(self.layers):
            state = None if cache is None else cache.layers[index]
            x = layer(x, embeddings, Inputs(layout, rope, state, maps.get(index)))
            hidden.append(x)
        if cache is not None:
            cache.advance(layout.real, layout.new)
        x = hidden[-1] = self.final_norm(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.lm_head(x if isinstance(kept, int) else x[:, kept]).float()
        loss = None
        if labels is not None:
            # The last position predicts nothing that is known.
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def _layout(self, embeddings: Tensor, attention_mask: Tensor | None, cache: LazypipeCache | None) -> Layout:
        batch, new, device = embeddings.shape[0], embeddings.shape[1], embeddings.device
        past = 0 if cache is None else cache.get_seq_length()
        real = None
        if attention_mask is not None:
            if attention_mask.shape != (batch, past + new):
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}; expected [{batch}, {past + new}], 1 or 0 "
                    f"for each of the {past} tokens before and of the {new} new ones"
                )
            real = attention_mask.to(device).bool()
        elif cache is not None and cache.real is not None:
            real = F.pad(cache.real, (0, new), value=True)
        if real is not None and bool(real.all()):
            real = None
        return Layout(past, new, real, device)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, signed sin), float32 [R, 1, L, D], of positions [R, L]; angles formed in float64 where there is one."""
        dtype = torch.float32 if positions.device.type == "mps" else torch.float64
        head_dim = self.config.head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=positions.device) / head_dim
        angles = positions[:, None, :, None].to(dtype) * self.config.rope_theta**-exponents
        cos, sin = angles.cos().float(), angles.sin().float()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def _maps(self, layout: Layout) -> dict[int, Maps]:
        """Queries and keys of the side sequence at each layer that reads them, by layer.

        Computed once and kept while the model is evaluated; as often as needed where it is trained.
        """
        if self.side is None:
            return {}
        limit, needed = self.config.max_position_embeddings, int(layout.positions.max()) + 1
        if needed > limit:
            raise ValueError(
                f"input too long: {needed} tokens are more than max_position_embeddings={limit}, where the side "
                f"sequence of {self.config.layer_mixers[self.side_layers[0]]} ends; stay within it"
            )
        if torch.is_grad_enabled() or self.training:
            self._kept_maps = None
            return self._compute_maps(needed)
        device = self.embedding.weight.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        tensors = (*self.parameters(), *self.buffers())
        state = (autocast, *((tensor.data_ptr(), tensor._version) for tensor in tensors))
        if self._kept_maps is None or self._kept_maps[0] != state:
            self._kept_maps = (state, self._compute_maps(limit))
        return self._kept_maps[1]

    def _compute_maps(self, length: int) -> dict[int, Maps]:
        """Carry the side sequence through the blocks; there a layer that reads it is plain self-attention."""
        assert self.side is not None
        if self.side.vectors is not None:
            x = self.side.vectors[None, :length]
        else:
            assert self.side.tokens is not None
            x = self.embedding(self.side.tokens[None, :length])
        embeddings, layout, found = x, Layout(0, length, None, x.device), dict[int, Maps]()
        rope = self._rope(layout.positions)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            if isinstance(layer.mixer, SideAttention):
                found[index] = layer.mixer.rotated(layer.mixer_norm(x), rope)
            if index == self.side_layers[-1]:
                break
            x = layer(x, embeddings, Inputs(layout, rope, None, found.get(index)))
        return found


def blocks(length: int) -> list[tuple[int, int]]:
    """(start, end) of `ROWS` at a time."""
    return [(start, min(start + ROWS, length)) for start in range(0, length, ROWS)]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE, half-split: dimension i is rotated together with i + D/2. x [B, heads, L, D], computed in float32."""
    cos, signed_sin = rope
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), signed_sin).to(x.dtype)


def quotient(sums: Tensor) -> Tensor:
    """Weighted sums [..., D] over the sum of weights in the last column; 0 where there is no weight (padding)."""
    total = sums[..., -1:]
    return sums[..., :-1] / total.masked_fill(total == 0, 1.0)


def running(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Running (maximum [B, H, L], sums [B, H, L, E] scaled by exp(-maximum)) of every stretch that begins at 0.

    Each position carries its own maximum: with one for all, exp underflows in the rows before a large score.
    """
    step = 1
    while step < maxima.shape[2]:
        joined = torch.maximum(maxima[:, :, step:], maxima[:, :, :-step])
        left, right = (torch.exp(part - joined)[..., None] for part in (maxima[:, :, :-step], maxima[:, :, step:]))
        later = left * sums[:, :, :-step] + right * sums[:, :, step:]
        maxima = torch.cat((maxima[:, :, :step], joined), dim=2)
        sums = torch.cat((sums[:, :, :step], later), dim=2)
        step *= 2
    return maxima, sums
