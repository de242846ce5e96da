"""1.5-entmax against bisection of its definition, and its gradient against the closed form."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.entmax import EntmaxAttention, entmax15
from tests.model.oracles import agrees_with, some_heads
from tests.model.tiny_model import awake, some_tokens, sparsity_by_layer, tiny

CONFIG = ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2)


def by_bisection(scores: Tensor) -> Tensor:
    """max(s / 2 - t, 0)^2 with t halved in until the sum is 1; float64 [K]."""
    x = scores.double() / 2
    low, high = x.max() - 1, x.max()
    for _ in range(100):
        middle = (low + high) / 2
        above = (x - middle).clamp(min=0).square().sum() > 1
        low, high = (middle, high) if above else (low, middle)
    return (x - (low + high) / 2).clamp(min=0).square()


class Bisected(torch.autograd.Function):
    """The oracle, with the gradient of Peters et al. 2019: J = diag(r) - r r^T / sum r, r = p^0.5."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, scores: Tensor) -> Tensor:
        p = by_bisection(scores)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        root = p.sqrt()
        jacobian = torch.diag(root) - torch.outer(root, root) / root.sum()
        return jacobian @ gradient


@pytest.mark.parametrize(("query_len", "key_len"), [(9, 9), (1, 9), (4, 9), (1, 1)])
def test_entmax_is_its_definition(query_len: int, key_len: int) -> None:
    agrees_with(EntmaxAttention(CONFIG), lambda scores, _: Bisected.apply(scores), query_len, key_len)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=12))
def test_any_row_has_mass_one_and_the_weights_of_the_bisection(values: list[float]) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    p = entmax15(scores)
    torch.testing.assert_close(p, by_bisection(scores), rtol=0, atol=1e-9)
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(entmax15(scores.float()).double(), p, rtol=0, atol=1e-4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(4, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    assert (entmax15(scores) == 0).any()
    assert torch.autograd.gradcheck(entmax15, scores)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 30.0])
def test_long_rows_keep_their_mass_in_float32(spread: float) -> None:
    """4096 keys, all of them in the support or few: running sums alone would be off by 1e-4."""
    scores = spread * torch.randn(3, 4096, generator=torch.Generator().manual_seed(0)) + 50
    p = entmax15(scores)
    torch.testing.assert_close(p.sum(-1), torch.ones(3), rtol=0, atol=2e-5)
    for row, found in zip(scores, p, strict=True):
        torch.testing.assert_close(found.double(), by_bisection(row), rtol=1e-2, atol=1e-6)


def test_masked_scores_get_nothing_and_take_nothing() -> None:
    q, k, _ = (x.float() for x in some_heads(8))
    scores = EntmaxAttention(CONFIG).scores(q, k)[0, 0, 7]
    hidden = torch.cat((scores, torch.full((5,), -torch.inf))).requires_grad_()
    p = entmax15(hidden)
    assert (p[8:] == 0).all()
    torch.testing.assert_close(p[:8], entmax15(scores))
    (gradient,) = torch.autograd.grad(p.square().sum(), hidden)
    assert gradient.isfinite().all() and (gradient[8:] == 0).all()


def test_sparsity_is_the_share_of_zeros_in_the_rows() -> None:
    model = awake(tiny("entmax", num_kv_heads=2))
    tokens = some_tokens(2, 20)
    lower = torch.ones(20, 20).tril().bool()
    counted = [float((weights[..., lower] == 0).float().mean()) for _, _, weights in model.attention_rows(tokens, 20)]
    assert 0.1 < counted[0] < 0.95
    assert sparsity_by_layer(model, tokens) == pytest.approx(counted)
