"""random_qk and text_qk against the paper's way of computing them, the side sequence as one more row of the batch."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.rope import apply_rope, rope_tables
from lazypipe.model.transformer import Transformer
from tests.model.tiny_model import VOCAB, awake, some_tokens, tiny

LENGTH = 14


def by_hand(model: Transformer, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits float64 [B, L, V]: every layer on B + 1 rows, the last of which gives Q and K to all in its layers."""
    assert model.side is not None
    embedding = weights["embedding.weight"]
    fixed = model.side.vectors if model.side.vectors is not None else model.side.tokens
    assert fixed is not None
    last_row = fixed.double() if fixed.is_floating_point() else embedding[fixed]
    x = torch.cat((embedding[tokens], last_row[None, : tokens.shape[1]]))
    rope = rope_tables(0, tokens.shape[1], 8, 10_000.0, tokens.device)
    mask = torch.ones(tokens.shape[1], tokens.shape[1]).tril().bool()
    for index, kind in enumerate(model.config.layer_mixers):
        w = {name.removeprefix(f"layers.{index}."): tensor for name, tensor in weights.items()}
        h = norm(x, w["mixer_norm.weight"])
        source = h if kind == "standard" else h[-1:].expand_as(h)
        q, k = (heads(source @ w[f"mixer.{name}_proj.weight"].T) for name in "qk")
        q, k = (apply_rope(one, rope).double() for one in (q, k))
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(8)
        out = torch.softmax(scores.masked_fill(~mask, -math.inf), -1) @ heads(h @ w["mixer.v_proj.weight"].T)
        x = x + out.transpose(1, 2).flatten(2) @ w["mixer.o_proj.weight"].T
        h = norm(x, w["mlp_norm.weight"])
        opened = F.silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)
        x = x + opened @ w["mlp.down_proj.weight"].T
    return norm(x[:-1], weights["final_norm.weight"]) @ embedding.T


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 8)).transpose(1, 2)


@pytest.mark.parametrize("pattern", ["uniform", [2], [1, 3]], ids=str)
@pytest.mark.parametrize("mixer", ["random_qk", "text_qk"])
def test_logits_and_gradients_are_those_of_one_more_row(mixer: str, pattern: object) -> None:
    model = awake(tiny(mixer, pattern=pattern, num_layers=3))
    tokens = some_tokens(3, LENGTH)
    weights = {name: one.detach().double().requires_grad_() for name, one in model.named_parameters()}
    expected = by_hand(model, weights, tokens)
    logits = model(tokens)
    torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=1e-4)
    seen = torch.randn(3, LENGTH, VOCAB, generator=torch.Generator().manual_seed(0))
    (logits * seen).sum().backward()
    (expected * seen).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = weights[name].grad
        assert gradient is not None
        difference = (parameter.grad.double() - gradient).norm() / gradient.norm()
        assert difference < 1e-4, (name, float(difference))


@torch.no_grad()
def test_maps_are_the_same_for_every_input_and_differ_by_layer() -> None:
    model = awake(tiny("random_qk"))
    one, other = ([w for _, _, w in model.attention_rows(some_tokens(2, 12, seed), 12)] for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert one[0].shape == (2, 4, 12, 12)
    assert torch.equal(one[0][0], one[0][1]) and not torch.allclose(one[0], one[1], atol=0.1)


def test_inference_computes_the_maps_once_until_a_weight_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = awake(tiny("text_qk")), []
    compute = Transformer._side_maps
    monkeypatch.setattr(Transformer, "_side_maps", lambda self, length: lengths.append(length) or compute(self, length))
    tokens = some_tokens(1, 9)
    with torch.no_grad():
        first = model(tokens)
        cache = model.new_cache(9)
        for token in tokens.split(1, dim=1):
            model(token, cache)
    assert lengths == [32]  # max_seq_len, once for everything
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.1, fused=True)
    model(tokens).sum().backward()
    with torch.no_grad():
        model(tokens)  # a look at the validation text between gradient and step
    optimizer.step()
    model.eval()
    with torch.no_grad():
        assert not torch.allclose(model(tokens), first, atol=1e-3)
        assert lengths == [32, 9, 9, 32]
        assert model.side is not None
        model.side.set_tokens(torch.arange(32))
        model(tokens)
    assert lengths == [32, 9, 9, 32, 32]


def test_inputs_beyond_the_side_sequence_are_refused() -> None:
    model = awake(tiny("random_qk"))
    with pytest.raises(
        ValueError, match=r"33 tokens are more than max_seq_len=32, where the side sequence of mixer=rand"
    ):
        model(some_tokens(1, 33))
    cache = model.new_cache(40)
    with torch.no_grad():
        model(some_tokens(1, 32), cache)
        with pytest.raises(ValueError, match="33 tokens are more than max_seq_len=32"):
            model(some_tokens(1, 1), cache)


def test_the_random_sequence_is_of_the_seed_and_no_parameter() -> None:
    vectors: list[Any] = [
        Transformer(tiny("random_qk", hidden_size=256), VOCAB, seed).side.vectors for seed in (3, 3, 4)
    ]
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], vectors[2])
    assert vectors[0].shape == (32, 256) and not vectors[0].requires_grad
    torch.testing.assert_close(vectors[0].std(), torch.tensor(0.02), rtol=0.03, atol=0)


def test_text_that_is_missing_or_misplaced_is_said() -> None:
    model = Transformer(tiny("text_qk"), VOCAB)
    with pytest.raises(ValueError, match=r"text_qk has no side tokens yet; .*set_tokens"):
        model(some_tokens(1, 3))
    with pytest.raises(ValueError, match=r"shape \[5\] for a text_qk model; text_qk takes max_seq_len=32"):
        model.side.set_tokens(torch.arange(5))
    with pytest.raises(ValueError, match="for a random_qk model"):
        Transformer(tiny("random_qk"), VOCAB).side.set_tokens(torch.arange(32))
    mixer = awake(tiny("random_qk")).layers[0].mixer
    with pytest.raises(ValueError, match=r"an input \[1, 3, 32\] came without them"):
        mixer(torch.zeros(1, 3, 32), BlockInputs(rope_tables(0, 3, 8, 10_000.0, torch.device("cpu"))))
