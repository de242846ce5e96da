"""Elliptical attention against loops over tokens, layers and coordinates."""

import pytest
import torch
from torch import Tensor

from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.rope import apply_rope, rope_tables
from tests.model.oracles import output_of, weights_of
from tests.model.tiny_model import awake, some_tokens, tiny


def stretch(v: Tensor, below: Tensor) -> Tensor:
    """m [B, Hkv, L, D] float64, one number at a time."""
    m = torch.zeros(v.shape, dtype=torch.float64)
    for b in range(v.shape[0]):
        for head in range(v.shape[1]):
            for i in range(v.shape[2]):
                change = [(v[b, head, j].double() - below[b, head, j].double()).abs() for j in range(i + 1)]
                mean = sum(change) / len(change)
                m[b, head, i] = mean / mean.max()
    return m


def softmax(scores: Tensor, _: int) -> Tensor:
    return scores.exp() / scores.exp().sum()


@torch.no_grad()
def test_elliptical_is_its_definition() -> None:
    mixer = awake(tiny("elliptical", num_kv_heads=2)).layers[1].mixer
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 11, 32, generator=generator)
    below = torch.randn(2, 2, 11, 8, generator=generator)
    rope = rope_tables(0, 11, 8, 10_000.0, x.device)
    inputs = BlockInputs(rope, values=below, returns_values=True)
    q, k = mixer.unrotated(x)
    v = mixer.new_values(x)
    m = stretch(v, below)
    m = torch.stack([m[:, head // 2] for head in range(4)], dim=1)
    exact = apply_rope((q.double() * m).float(), rope).double(), apply_rope(k, rope).double()
    expected = weights_of(softmax, *exact)
    (_, weights), *_ = mixer.attention_rows(x, inputs, 11)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-5)
    out, values, _ = mixer(x, inputs)
    torch.testing.assert_close(out, mixer.project(output_of(expected, v.double()).float()), rtol=1e-4, atol=1e-4)
    assert torch.equal(values, v) and mixer(x, BlockInputs(rope)).values is None


def test_one_layer_alone_is_standard_attention_and_two_are_not() -> None:
    tokens = some_tokens(2, 12)
    with torch.no_grad():
        elliptical, standard = awake(tiny("elliptical", num_layers=1)), awake(tiny("standard", num_layers=1))
        assert torch.equal(elliptical(tokens), standard(tokens))
        elliptical, standard = awake(tiny("elliptical")), awake(tiny("standard"))
        assert not torch.allclose(elliptical(tokens), standard(tokens), atol=1e-3)


def test_the_stretch_carries_no_gradient() -> None:
    """With V of both layers cut from the output, nothing but m could bring a gradient to it."""
    mixer = awake(tiny("elliptical")).layers[1].mixer
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    below = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    rope = rope_tables(0, 6, 8, 10_000.0, x.device)
    q, _ = mixer.queries_and_keys(x, BlockInputs(rope, values=below))
    q.square().sum().backward()
    assert below.grad is None and mixer.v_proj.weight.grad is None
    assert mixer.q_proj.weight.grad.abs().sum() > 0


def test_values_that_do_not_change_leave_the_queries_alone() -> None:
    mixer = awake(tiny("elliptical")).layers[1].mixer
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    rope = rope_tables(0, 6, 8, 10_000.0, x.device)
    with torch.no_grad():
        first, same = BlockInputs(rope), BlockInputs(rope, values=mixer.new_values(x))
        assert torch.equal(mixer.queries_and_keys(x, same)[0], mixer.queries_and_keys(x, first)[0])


@pytest.mark.parametrize("pieces", [[1] * 15, [4, 1, 7, 3]], ids=str)
def test_the_running_mean_goes_on_through_the_cache(pieces: list[int]) -> None:
    model = awake(tiny("elliptical", num_layers=3, num_kv_heads=2, pattern=[2]))
    tokens = some_tokens(2, 15)
    cache = model.new_cache(15)
    with torch.no_grad():
        parts = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-4)
