"""Attention in several blocks of queries is attention in one, gradients included."""

import pytest
import torch

from lazypipe.model.mixers import query_blocks
from lazypipe.model.mixers.query_blocks import zero_share
from lazypipe.model.transformer import Transformer
from tests.model.tiny_model import awake, some_tokens, tiny

BLOCKWISE = ("sigmoid", "entmax", "stick_breaking", "alibi")


def logits_and_gradients(model: Transformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(tokens)
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mixer", BLOCKWISE)
def test_blocks_change_neither_output_nor_gradient(monkeypatch: pytest.MonkeyPatch, mixer: str, autocast: bool) -> None:
    fields = {"sigmoid_bias_learnable": True} if mixer == "sigmoid" else {}
    model = awake(tiny(mixer, num_kv_heads=2, init_std=0.02, **fields))
    tokens = some_tokens(2, 23)
    tolerance = 3e-2 if autocast else 2e-5
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        whole = logits_and_gradients(model, tokens)
        monkeypatch.setattr(query_blocks, "QUERY_ROWS", 5)
        blocks = logits_and_gradients(model, tokens)
    for one, other in zip(whole, blocks, strict=True):
        assert (one - other).norm() <= tolerance * one.norm()


def test_blocks_continue_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_blocks, "QUERY_ROWS", 4)
    tokens = some_tokens(1, 20)
    with torch.no_grad():
        for mixer in BLOCKWISE:
            model = awake(tiny(mixer))
            cache = model.new_cache(20)
            parts = [model(piece, cache) for piece in tokens.split([9, 11], dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-4)


def test_only_one_block_of_weights_is_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd saves between: numbers that grow with L, not with L^2."""
    monkeypatch.setattr(query_blocks, "QUERY_ROWS", 16)
    mixer = awake(tiny("sigmoid")).layers[0].mixer
    q, k, v = torch.randn(3, 1, 4, 128, 8, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    largest = 0

    def record(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        mixer.attend(q, k, v)
    assert largest <= 4 * 128 * 8


def test_zeros_are_counted_among_visible_pairs_only() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])[None, None]
    assert zero_share(iter([(0, weights)])).tolist() == pytest.approx([2 / 6])
    assert zero_share(iter([(0, weights[:, :, :2]), (2, weights[:, :, 2:])])).tolist() == pytest.approx([2 / 6])
    with pytest.raises(ValueError, match="no rows"):
        zero_share(iter([]))
