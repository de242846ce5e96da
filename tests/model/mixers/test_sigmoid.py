"""Sigmoid attention against its definition, with a constant and with a learned bias."""

import math

import pytest
import torch
from torch import Tensor

from lazypipe.model.config import ModelConfig, parameter_count
from lazypipe.model.mixers.sigmoid import SigmoidAttention
from lazypipe.model.transformer import Transformer, count_parameters
from tests.model.oracles import agrees_with
from tests.model.tiny_model import VOCAB, awake, some_tokens, tiny

SHAPE = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 12}


@pytest.mark.parametrize(("query_len", "key_len"), [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("fields", [{}, {"sigmoid_bias": 0.75}], ids=str)
def test_sigmoid_is_its_definition(query_len: int, key_len: int, fields: dict[str, float]) -> None:
    bias = fields.get("sigmoid_bias", -math.log(12))

    def row(scores: Tensor, _: int) -> Tensor:
        return 1 / (1 + (-scores - bias).exp())

    agrees_with(SigmoidAttention(ModelConfig.model_validate({**SHAPE, **fields})), row, query_len, key_len)


def test_a_learned_bias_belongs_to_its_head_and_gets_its_gradient() -> None:
    mixer = SigmoidAttention(ModelConfig.model_validate({**SHAPE, "sigmoid_bias_learnable": True}))
    assert mixer.logit_bias is not None
    with torch.no_grad():
        mixer.logit_bias.copy_(torch.tensor([-2.0, 0.0, 1.0, 3.0]))
    bias = mixer.logit_bias

    def row(scores: Tensor, head: int) -> Tensor:
        return 1 / (1 + (-scores - bias[head].double()).exp())

    agrees_with(mixer, row, 7, 7, (bias,))


def test_the_learned_bias_starts_at_the_constant_and_is_counted() -> None:
    config = tiny("sigmoid", sigmoid_bias_learnable=True)
    model = Transformer(config, VOCAB)
    assert parameter_count(config, VOCAB) == count_parameters(model)[0] == parameter_count(tiny("sigmoid"), VOCAB) + 8
    for layer in model.layers:
        torch.testing.assert_close(layer.mixer.logit_bias, torch.full((4,), -math.log(32)))
    tokens = some_tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), Transformer(tiny("sigmoid"), VOCAB)(tokens))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens).square().mean().backward()
    assert model.layers[0].mixer.logit_bias.grad.dtype == torch.float32


def test_flat_scores_over_the_trained_length_sum_to_about_one() -> None:
    mixer = SigmoidAttention(ModelConfig.model_validate({**SHAPE, "max_seq_len": 64}))
    q, k = torch.zeros(1, 4, 64, 8), torch.zeros(1, 2, 64, 8)
    mass = mixer.weights(q, k).sum(-1)
    torch.testing.assert_close(mass[0, 0, -1], torch.tensor(64 / 65))


def test_decoding_with_a_learned_bias() -> None:
    model = awake(tiny("sigmoid", sigmoid_bias_learnable=True, num_kv_heads=2))
    tokens = some_tokens(2, 17)
    cache = model.new_cache(17)
    with torch.no_grad():
        parts = [model(token, cache) for token in tokens.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-4)
