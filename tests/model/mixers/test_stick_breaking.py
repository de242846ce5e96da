"""Stick-breaking attention against its products, and where float32 products would fail."""

import pytest
import torch
from torch import Tensor

from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.mixers.stick_breaking import StickBreakingAttention
from tests.model.oracles import agrees_with
from tests.model.tiny_model import awake, some_tokens, sparsity_by_layer, tiny


def mixer_of(remainder: bool = False) -> StickBreakingAttention:
    return StickBreakingAttention(
        ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2, stick_breaking_remainder=remainder)
    )


def stick(scores: Tensor, remainder: bool) -> Tensor:
    """From the nearest key to the farthest, each takes sigma(s) of what is left."""
    weights = [scores.new_zeros(())] * len(scores)
    left = scores.new_ones(())
    for key in reversed(range(len(scores) - 1)):
        share = 1 / (1 + (-scores[key]).exp())
        weights[key] = left * share
        left = left * (1 - share)
    if remainder:
        weights[-1] = left
    # The own score has no part in it; 0 times it keeps the first row in the graph.
    return torch.stack(weights) + 0 * scores


@pytest.mark.parametrize("remainder", [False, True])
@pytest.mark.parametrize(("query_len", "key_len"), [(9, 9), (1, 9), (4, 9), (1, 1)])
def test_stick_breaking_is_its_definition(query_len: int, key_len: int, remainder: bool) -> None:
    agrees_with(mixer_of(remainder), lambda scores, _: stick(scores, remainder), query_len, key_len)


def test_the_first_row_is_empty_and_with_the_remainder_rows_sum_to_one() -> None:
    q, k = torch.randn(2, 1, 4, 40, 8, generator=torch.Generator().manual_seed(0))
    k = k[:, :2]
    dropped, kept = mixer_of().weights(q, k), mixer_of(remainder=True).weights(q, k)
    assert (dropped[:, :, 0] == 0).all()
    assert (dropped.diagonal(dim1=-2, dim2=-1) == 0).all()
    assert (dropped.sum(-1) <= 1 + 1e-5).all()
    torch.testing.assert_close(kept.sum(-1), torch.ones(1, 4, 40))


def test_scores_of_a_hundred_keep_value_and_gradient_finite() -> None:
    """sigma(-100) is 4e-44: a product of (1 - sigma) in float32 is lost, its logarithm is not."""
    q = torch.full((1, 4, 6, 8), 100.0, requires_grad=True)
    k = torch.full((1, 2, 6, 8), 1 / 8**0.5)
    for sign in (1.0, -1.0):
        weights = mixer_of().weights(sign * q, k)
        expected = torch.zeros(6, 6)
        if sign > 0:
            expected[1:, :-1] = torch.eye(5)
        torch.testing.assert_close(weights[0, 0], expected)
        (gradient,) = torch.autograd.grad(weights.sum(), q)
        assert gradient.isfinite().all()


def test_nothing_is_rotated_and_the_own_key_counts_as_a_zero() -> None:
    model = awake(tiny("stick_breaking"))
    rope = (torch.full((10, 8), torch.nan), torch.full((10, 8), torch.nan))
    with torch.no_grad():
        assert model.layers[0].mixer(torch.randn(1, 10, 32), BlockInputs(rope)).x.isfinite().all()
    assert sparsity_by_layer(model, some_tokens(1, 20)) == pytest.approx([20 / 210] * 2)
