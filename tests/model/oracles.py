"""Attention by its definition: float64, one query at a time. What the mixers are held against."""

from collections.abc import Callable

import torch
from torch import Tensor

from lazypipe.model.mixers.base import AttentionMixer

HEADS, KV_HEADS, WIDTH = 4, 2, 8

# row(scores of the visible keys [i + 1], head) -> their weights [i + 1]
Row = Callable[[Tensor, int], Tensor]


def some_heads(length: int, key_length: int | None = None, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """q [B, 4, L, 8], k and v [B, 2, K, 8] float64, scores up to about 10 either way: no weight is near another."""
    generator = torch.Generator().manual_seed(seed)
    keys = key_length or length
    shapes = ((HEADS, length), (KV_HEADS, keys), (KV_HEADS, keys))
    q, k, v = (torch.randn(batch, *s, WIDTH, generator=generator, dtype=torch.float64) for s in shapes)
    return 2.0 * q, 1.5 * k, v


def weights_of(row: Row, q: Tensor, k: Tensor) -> Tensor:
    """[B, H, Lq, Lk] float64; the queries are the last positions, query head h reads key head h // 2."""
    batch, heads, query_len, _ = q.shape
    key_len = k.shape[2]
    rows = []
    for b in range(batch):
        for head in range(heads):
            for query in range(query_len):
                position = key_len - query_len + query
                keys = k[b, head // (heads // k.shape[1]), : position + 1]
                scores = (keys * q[b, head, query]).sum(-1) / WIDTH**0.5
                weights = row(scores, head)
                rows.append(torch.cat((weights, weights.new_zeros(key_len - position - 1))))
    return torch.stack(rows).view(batch, heads, query_len, key_len)


def output_of(weights: Tensor, v: Tensor) -> Tensor:
    """sum_j A_ij v_j, [B, H, Lq, D]."""
    return torch.stack([weights[:, head] @ v[:, head // 2] for head in range(weights.shape[1])], dim=1)


def agrees_with(mixer: AttentionMixer, row: Row, query_len: int, key_len: int, extra: tuple[Tensor, ...] = ()) -> None:
    """Weights, output, and the gradients by q, k, v and `extra` parameters, in float32 against the float64 oracle."""
    exact = some_heads(query_len, key_len)
    given = tuple(x.float().requires_grad_() for x in exact)
    exact = tuple(x.detach().double().requires_grad_() for x in given)
    expected_weights = weights_of(row, *exact[:2])
    expected = output_of(expected_weights, exact[2])
    out = mixer.attend(*given)
    assert out.shape == expected.shape and out.dtype == torch.float32
    torch.testing.assert_close(mixer.weights(*given[:2]).double(), expected_weights, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=5e-6)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((out * direction.float()).sum(), (*given, *extra))
    wanted = torch.autograd.grad((expected * direction).sum(), (*exact, *extra))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=2e-5)
