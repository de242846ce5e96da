"""Gating against sums by hand, and its scan where one maximum for all rows would underflow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lazypipe.model.cache import RecurrentState
from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.mixers.gating import GatingMixer, running_softmax
from lazypipe.model.rope import rope_tables
from tests.model.tiny_model import awake, some_tokens, tiny


def by_hand(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Softmax average of the first i + 1 values in float64, one row at a time; scores [L], values [L, D]."""
    rows = [torch.softmax(scores[: i + 1].double(), 0) @ values[: i + 1].double() for i in range(len(scores))]
    return torch.stack(rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1.0, 30.0, 300.0]), st.integers(0, 10**6))
def test_the_scan_is_the_softmax_average_of_every_prefix(length: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(length, generator=generator) * spread
    values = torch.randn(length, 3, generator=generator)
    out, state = running_softmax(scores, values)
    torch.testing.assert_close(out.double(), by_hand(scores, values), atol=1e-5, rtol=1e-5)
    assert float(state[0]) == float(scores.max())
    cut = seed % length
    if cut:
        head, before = running_softmax(scores[:cut], values[:cut])
        tail, after = running_softmax(scores[cut:], values[cut:], before)
        torch.testing.assert_close(torch.cat((head, tail)), out, atol=1e-5, rtol=1e-5)
        assert torch.equal(after[0], state[0])


def test_rows_before_a_huge_score_keep_their_values() -> None:
    """exp(e_j - 500) is 0 in float32 for the first two; their average must not become 0 / 0."""
    out, _ = running_softmax(torch.tensor([0.0, 0.0, 500.0]), torch.tensor([[1.0], [3.0], [7.0]]))
    assert out.flatten().tolist() == [1.0, 2.0, 7.0]


def test_gradients_are_those_of_the_quadratic_form() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(2, 3, 21, generator=generator) * 3).double().requires_grad_()
    values = torch.randn(2, 3, 21, 4, generator=generator).double().requires_grad_()
    seen = torch.randn(2, 3, 21, 4, generator=generator).double()
    mask = torch.ones(21, 21).tril().bool()
    weights = torch.softmax(scores[:, :, None].expand(2, 3, 21, 21).masked_fill(~mask, -math.inf), -1)
    expected = torch.autograd.grad((weights @ values * seen).sum(), (scores, values))
    found = torch.autograd.grad((running_softmax(scores, values)[0] * seen).sum(), (scores, values))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fields", [{}, {"num_kv_heads": 2}, {"qk_norm": True}], ids=str)
@torch.no_grad()
def test_the_layer_is_its_definition(fields: dict[str, object]) -> None:
    mixer = awake(tiny("gating", **fields)).layers[0].mixer
    assert isinstance(mixer, GatingMixer)
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    q, k, v = (x[0].double() @ one.weight.double().T for one in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    outputs = []
    for head in range(4):
        of_key = head // (4 // mixer.kv_heads)
        own = [one[:, h * 8 : h * 8 + 8] for one, h in ((q, head), (k, of_key), (v, of_key))]
        if mixer.q_norm is not None and mixer.k_norm is not None:
            for n, norm in ((0, mixer.q_norm), (1, mixer.k_norm)):
                own[n] = own[n] / (own[n].square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
        e = (own[0] * torch.sigmoid(own[0]) * own[1]).sum(-1) / math.sqrt(8)
        outputs.append(by_hand(e, own[2]))
    expected = torch.cat(outputs, dim=-1) @ mixer.o_proj.weight.double().T
    out = mixer(x, BlockInputs(rope_tables(0, 9, 8, 10_000.0, x.device))).x
    torch.testing.assert_close(out[0].double(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_decoding_state_is_a_few_numbers_per_head() -> None:
    model = awake(tiny("gating"))
    cache = model.new_cache(50)
    for tokens in some_tokens(2, 50).split([7, 1, 42], dim=1):
        model(tokens, cache)
        for layer in cache.layers:
            assert isinstance(layer, RecurrentState)
            assert [tensor.shape for tensor in layer.tensors] == [(2, 4, 1), (2, 4, 1, 9)]
