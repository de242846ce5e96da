"""Attention a block of query rows at a time, for what torch has no fused kernel for."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lazypipe.model.mixers.base import AttentionMixer
from lazypipe.model.mixers.costs import QUERY_ROWS
from lazypipe.model.packing import Documents


def in_query_blocks(attend_rows: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attend_rows(q, k, v) for QUERY_ROWS queries at a time, joined: [B, H, Lq, D].

    q [B, H, Lq, D] are the last Lq positions of k, v [B, Hkv, Lk, D]; a block gets the keys up to its last query. With
    more than one block the backward pass computes each again, so that what a block needs between, rows x Lk numbers per
    head, exists for one block at a time; the price is one more forward pass.
    """
    query_len, seen_before = q.shape[2], k.shape[2] - q.shape[2]
    if query_len <= QUERY_ROWS:
        return attend_rows(q, k, v)
    outputs: list[Tensor] = []
    for start in range(0, query_len, QUERY_ROWS):
        end = min(start + QUERY_ROWS, query_len)
        keys, values = k[:, :, : seen_before + end], v[:, :, : seen_before + end]
        outputs.append(
            checkpoint(attend_rows, q[:, :, start:end], keys, values, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(outputs, dim=2)


class RowwiseAttention(AttentionMixer):
    """Attention whose output is its `weights` times V, a block of query rows at a time.

    Time grows with Lq Lk, memory with QUERY_ROWS Lk per head; half of the products are of masked pairs at the worst.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return in_query_blocks(self.by_weights, q, k, v)


def zero_share(rows: Iterator[tuple[int, Tensor]], documents: Documents | None = None) -> Tensor:
    """Share of exact zeros among all (query, visible key) pairs, [H] float32, of rows as `attention_rows` yields them.

    Keys of another document are not visible. Raises ValueError when there are no rows.
    """
    zeros, pairs = None, 0
    for start, weights in rows:
        seen = torch.ones(weights.shape[2:], dtype=torch.bool, device=weights.device).tril(start)
        if documents is not None:
            queries = torch.arange(start, start + weights.shape[2], device=weights.device)
            first_keys = queries - documents.positions[queries]
            seen &= torch.arange(weights.shape[3], device=weights.device) >= first_keys[:, None]
        found = ((weights == 0) & seen).sum((-2, -1)).float().mean(0)
        zeros = found if zeros is None else zeros + found
        pairs += int(seen.sum())
    if zeros is None:
        raise ValueError("the attention has no rows to count zeros in; give it at least one token")
    return zeros / pairs
