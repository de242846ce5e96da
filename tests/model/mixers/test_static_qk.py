"""Attention from token embeddings: its weights by hand, and what they depend on."""

import math

import pytest
import torch

from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.rope import apply_rope, rope_tables
from tests.model.tiny_model import awake, some_tokens, tiny


@torch.no_grad()
def test_weights_are_softmax_over_normed_token_embeddings_at_every_layer() -> None:
    model = awake(tiny("static_qk"))
    tokens = some_tokens(1, 12)
    rope = rope_tables(0, 12, 8, 10_000.0, tokens.device)
    e = model.embedding.weight[tokens[0]].double()
    for (index, _, weights), layer in zip(model.attention_rows(tokens, 12), model.layers, strict=True):
        normed = e / (e.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.mixer_norm.weight.double()
        for head in range(4):
            rows = slice(8 * head, 8 * head + 8)
            q, k = (normed @ one.weight[rows].double().T for one in (layer.mixer.q_proj, layer.mixer.k_proj))
            q, k = (apply_rope(one.float()[None, None], rope)[0, 0].double() for one in (q, k))
            for i in range(12):
                scores = torch.stack([q[i] @ k[j] for j in range(i + 1)]) / math.sqrt(8)
                found = weights[0, head, i, : i + 1].double()
                torch.testing.assert_close(found, torch.softmax(scores, 0), atol=1e-4, rtol=1e-3, msg=str(index))


@torch.no_grad()
def test_the_hidden_states_change_values_and_not_weights() -> None:
    model = awake(tiny("static_qk"))
    tokens = some_tokens(1, 12)
    before = [weights for _, _, weights in model.attention_rows(tokens, 12)]
    logits = model(tokens)
    model.layers[0].mlp.down_proj.weight.mul_(-1)
    after = [weights for _, _, weights in model.attention_rows(tokens, 12)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not torch.allclose(model(tokens), logits)


def test_without_the_embeddings_it_says_what_it_needs() -> None:
    mixer = awake(tiny("static_qk")).layers[0].mixer
    with pytest.raises(ValueError, match=r"static_qk reads the token embeddings of its input \[1, 3, 32\]"):
        mixer(torch.zeros(1, 3, 32), BlockInputs(rope_tables(0, 3, 8, 10_000.0, torch.device("cpu"))))
