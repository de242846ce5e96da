"""Softmax over scores of the keys alone: the "non-approximate" gating of "Deconstructing Attention" (2510.11602)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lazypipe.model.cache import LayerCache, RecurrentState
from lazypipe.model.mixers.base import BlockInputs, BlockOutputs, ProjectedMixer
from lazypipe.model.mixers.standard import visible
from lazypipe.model.packing import weight_rows


class GatingMixer(ProjectedMixer):
    """o_i = sum_{j<=i} exp(e_j) v_j / sum_{j<=i} exp(e_j), e_j = sum_c SiLU(H W_Q)_jc (H W_K)_jc / sqrt(D) per head.

    Query i has no say in its weights, so a running sum does it all: linear time, and a decoding state of one numerator,
    denominator and maximum per head. Position enters nowhere (RoPE would cancel in e_j).
    """

    def forward(self, x: Tensor, inputs: BlockInputs, cache: LayerCache | None = None) -> BlockOutputs:
        v = self.new_values(x)
        returned = self.returned_values(v, inputs)
        values, scores = self.per_query_head(v), self.key_scores(x)
        if inputs.documents is not None:
            out = inputs.documents.each(lambda *one: running_softmax(*one)[0], scores, values.float())
            return BlockOutputs(self.project(out.to(values.dtype)), returned)
        before = None
        if cache is not None:
            assert isinstance(cache, RecurrentState)
            before = cache.tensors or None
        out, after = running_softmax(scores, values.float(), before)
        if cache is not None:
            cache.tensors = tuple(tensor.clone() for tensor in after)  # a view would keep the whole prompt's sums
        return BlockOutputs(self.project(out.to(values.dtype)), returned)

    def new_cache(self, max_tokens: int) -> LayerCache:  # noqa: ARG002
        return RecurrentState()

    def attention_rows(self, x: Tensor, inputs: BlockInputs, query_block: int) -> Iterator[tuple[int, Tensor]]:
        scores = self.key_scores(x)[:, :, None]

        def weights_of(start: int, end: int, first_key: int) -> Tensor:
            mask = visible(end - start, end - first_key, x.device)
            return torch.softmax(scores[..., first_key:end].masked_fill(~mask, -torch.inf), dim=-1)

        return weight_rows(weights_of, x.shape[1], query_block, inputs.documents)

    def key_scores(self, x: Tensor) -> Tensor:
        """e [B, H, L] float32 of the layer input x [B, L, hidden], autocast or not."""
        q, k = self.unrotated(x)
        scores: Tensor = (F.silu(q.float()) * self.per_query_head(k).float()).sum(-1) * self.scale
        return scores


def running_softmax(
    scores: Tensor, values: Tensor, before: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Softmax average of the values so far, by scores [..., L] of values [..., L, D]: ([..., L, D], state after).

    state: (maximum [..., 1], numerator and denominator [..., 1, D + 1]), the same as `before` for what came before.
    Each position carries its own maximum: with one for all, exp underflows in the rows before a large score.
    """
    maxima = scores.detach()
    # exp(0) = 1 in value; the gradient of the scores goes through it, and the maxima need none.
    sums = torch.exp(scores - maxima)[..., None] * F.pad(values, (0, 1), value=1.0)
    if before is not None:
        maxima, sums = torch.cat((before[0], maxima), dim=-1), torch.cat((before[1], sums), dim=-2)
    maxima, sums = _scan(maxima, sums)
    state = (maxima[..., -1:], sums[..., -1:, :])
    new = sums[..., sums.shape[-2] - scores.shape[-1] :, :]
    return new[..., :-1] / new[..., -1:], state


def _scan(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Inclusive scan of `_join` over positions: maxima [..., L], sums [..., L, E], about 2 L joins at log2 L depths.

    Positions are joined in pairs, the pairs scanned, and the positions between pairs joined to the pair before them.
    """
    length = maxima.shape[-1]
    if length == 1:
        return maxima, sums
    pairs = length // 2
    odd = _scan(
        *_join(
            (maxima[..., 0 : 2 * pairs : 2], sums[..., 0 : 2 * pairs : 2, :]),
            (maxima[..., 1::2], sums[..., 1::2, :]),
        )
    )
    later = (length - 1) // 2
    even = _join((odd[0][..., :later], odd[1][..., :later, :]), (maxima[..., 2::2], sums[..., 2::2, :]))
    even = torch.cat((maxima[..., :1], even[0]), dim=-1), torch.cat((sums[..., :1, :], even[1]), dim=-2)
    return _interleave(even[0], odd[0], -1), _interleave(even[1], odd[1], -2)


def _join(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The (maximum, sums) of two neighbouring stretches as one."""
    maxima = torch.maximum(left[0], right[0])
    sums = (torch.exp(one[0] - maxima)[..., None] * one[1] for one in (left, right))
    return maxima, next(sums) + next(sums)


def _interleave(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    """even[0], odd[0], even[1], odd[1], ... along dim; even may be one longer."""
    pairs = odd.shape[dim]
    mixed = torch.stack((even.narrow(dim, 0, pairs), odd), dim=even.ndim + dim + 1).flatten(
        even.ndim + dim, even.ndim + dim + 1
    )
    return torch.cat((mixed, even.narrow(dim, pairs, even.shape[dim] - pairs)), dim=dim)
