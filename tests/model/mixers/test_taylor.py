"""Second-order attention: pairs by hand, the state against the pairs, and which of the two runs when."""

import math

import pytest
import torch

from lazypipe.model.cache import RecurrentState
from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.mixers.costs import TAYLOR_CHUNK, TAYLOR_STATE_FROM
from lazypipe.model.mixers.taylor import TaylorAttention
from lazypipe.model.rope import rope_tables
from tests.model.tiny_model import awake, some_tokens, tiny


def mixer_of(**fields: object) -> TaylorAttention:
    mixer = awake(tiny("taylor", **fields)).layers[0].mixer
    assert isinstance(mixer, TaylorAttention)
    return mixer


def heads(length: int, kv_heads: int = 4, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, count, length, 8, generator=generator) for count in (4, kv_heads, kv_heads))


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """float64, one query at a time, straight from the definition."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                total = 0.0
                for j in range(i + 1):
                    s = float(q[b, h, i].double() @ k[b, h // group, j].double()) / math.sqrt(q.shape[3])
                    weight = 1 + s + s * s / 2
                    total += weight
                    out[b, h, i] += weight * v[b, h // group, j].double()
                out[b, h, i] /= total
    return out


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_both_forms_are_the_definition(kv_heads: int) -> None:
    mixer, (q, k, v) = mixer_of(num_kv_heads=kv_heads), heads(15, kv_heads)
    expected = by_hand(q, k, v)
    torch.testing.assert_close(mixer.attend(q, k, v).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixer.attend_by_state(q, k, v, None)[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_the_state_gives_the_output_and_gradients_of_all_pairs_over_several_chunks() -> None:
    length = 2 * TAYLOR_CHUNK + 37
    mixer = mixer_of(num_kv_heads=2)
    q, k, v = (tensor.requires_grad_() for tensor in heads(length, 2))
    seen = torch.randn(2, 4, length, 8, generator=torch.Generator().manual_seed(3))
    pairs = mixer.weights(q, k) @ v.repeat_interleave(2, dim=1)
    state, _ = mixer.attend_by_state(q, k, v, None)
    torch.testing.assert_close(state, pairs, atol=1e-5, rtol=1e-4)
    expected = torch.autograd.grad((pairs * seen).sum(), (q, k, v))
    for found, gradient in zip(torch.autograd.grad((state * seen).sum(), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-3)


def test_features_are_those_of_the_paper_and_multiply_to_the_weight() -> None:
    assert TaylorAttention(ModelConfig(hidden_size=128, num_heads=2)).features == 2145
    mixer, (q, k, _) = mixer_of(), heads(6)
    assert mixer._expand(q).shape[-1] == mixer.features == 45
    s = (q.double() @ k.double().transpose(-1, -2)) / math.sqrt(8)
    product = mixer._expand(q.double()) @ mixer._expand(k.double()).transpose(-1, -2)
    torch.testing.assert_close(product, 1 + s + s**2 / 2)
    assert float(product.min()) >= 0.5


def test_long_inputs_take_the_state_and_short_ones_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, taken = mixer_of(), []
    by_state = TaylorAttention.attend_by_state
    monkeypatch.setattr(TaylorAttention, "attend_by_state", lambda *a: taken.append(a[1].shape[2]) or by_state(*a))
    border = int(TAYLOR_STATE_FROM * mixer.features)
    for length in (border, border + 1):
        q, k, v = heads(length)
        torch.testing.assert_close(mixer.attend(q, k, v), mixer.weights(q, k) @ v, atol=1e-5, rtol=1e-4)
    assert taken == [border + 1]


@torch.no_grad()
def test_the_decoding_state_does_not_grow() -> None:
    model = awake(tiny("taylor"))
    cache, sizes = model.new_cache(400), []
    for tokens in some_tokens(1, 400).split([3, 1, 396], dim=1):
        model(tokens, cache)
        assert all(isinstance(layer, RecurrentState) for layer in cache.layers)
        sizes.append([tensor.shape for layer in cache.layers for tensor in layer.tensors])
    assert sizes == [[(1, 4, 45, 9)] * 2] * 3


def test_positions_enter_by_rope() -> None:
    mixer = mixer_of()
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0)).expand(1, 5, 32)
    q, k = mixer.queries_and_keys(x, BlockInputs(rope_tables(0, 5, 8, 10_000.0, x.device)))
    assert mixer.weights(q, k)[0, 0, 4].std() > 1e-3
