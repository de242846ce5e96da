"""Softmax beside a key without value: the two mixers, and the fused call they share."""

import pytest
import torch
from torch import Tensor

from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.null_key import attend_with_null_key
from lazypipe.model.mixers.sink import SinkAttention
from lazypipe.model.mixers.softmax1 import Softmax1Attention
from lazypipe.stages.pretrain.optimizer import split_parameters
from tests.model.oracles import HEADS, agrees_with, some_heads
from tests.model.tiny_model import awake, some_tokens, tiny

CONFIG = ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2)
LENGTHS = [(9, 9), (1, 9), (4, 9), (1, 1)]


def sink_mixer() -> SinkAttention:
    mixer = SinkAttention(CONFIG)
    with torch.no_grad():
        mixer.sink.copy_(torch.tensor([-3.0, 0.0, 1.7, 6.0]))
    return mixer


@pytest.mark.parametrize(("query_len", "key_len"), LENGTHS)
def test_softmax1_is_its_definition(query_len: int, key_len: int) -> None:
    def row(scores: Tensor, _: int) -> Tensor:
        return scores.exp() / (1 + scores.exp().sum())

    agrees_with(Softmax1Attention(CONFIG), row, query_len, key_len)


@pytest.mark.parametrize(("query_len", "key_len"), LENGTHS)
def test_sink_is_its_definition_and_its_logit_learns(query_len: int, key_len: int) -> None:
    mixer = sink_mixer()

    def row(scores: Tensor, head: int) -> Tensor:
        return scores.exp() / (mixer.sink[head].double().exp() + scores.exp().sum())

    agrees_with(mixer, row, query_len, key_len, (mixer.sink,))


def test_a_fresh_sink_is_softmax1() -> None:
    tokens = some_tokens(2, 12)
    sink, softmax1 = awake(tiny("sink")), awake(tiny("softmax1"))
    with torch.no_grad():
        for layer in sink.layers:
            layer.mixer.sink.zero_()
        sink.load_state_dict(softmax1.state_dict(), strict=False)
        torch.testing.assert_close(sink(tokens), softmax1(tokens))


def test_scores_and_logits_of_a_hundred_neither_overflow_nor_vanish() -> None:
    q, k, v = (x.float() for x in some_heads(6))
    for mixer in (Softmax1Attention(CONFIG), sink_mixer()):
        for scale in (100.0, 0.01):
            out = mixer.attend(q * scale, k, v)
            assert out.isfinite().all()
            weights = mixer.weights(q * scale, k)
            assert weights.isfinite().all() and (weights.sum(-1) <= 1 + 1e-6).all()
    silent = attend_with_null_key(q, k, v, 8**-0.5, torch.full((HEADS,), 100.0))
    assert silent.abs().max() < 1e-20
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    deaf = attend_with_null_key(q, k, v, 8**-0.5, torch.full((HEADS,), -100.0))
    torch.testing.assert_close(deaf, plain)


def test_the_logit_keeps_its_precision_in_bfloat16() -> None:
    """Equal keys: the output is v n / (n + exp(sink)), which a logit rounded to bfloat16 would miss by 1 to 6 %."""
    logit = torch.tensor([20.06, 9.03, 13.03, 5.01])
    q = torch.zeros(1, HEADS, 4, 8, dtype=torch.bfloat16)
    k, v = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16), torch.ones(1, 2, 4, 8, dtype=torch.bfloat16)
    out = attend_with_null_key(q, k, v, 8**-0.5, logit)[0, :, :, 0].double()
    seen = torch.arange(1, 5, dtype=torch.float64)
    expected = seen / (seen + logit.double().exp()[:, None])
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)
    rounded = logit.bfloat16().double()
    assert ((seen / (seen + rounded.exp()[:, None]) / expected - 1).abs()[:3] > 2 * 2**-7).all()


def test_the_sink_stays_float32_and_counts_one_parameter_per_head() -> None:
    model = awake(tiny("sink"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(some_tokens(1, 10)).square().mean().backward()
    gradient = model.layers[0].mixer.sink.grad
    assert gradient.dtype == torch.float32 and gradient.abs().min() > 0
    extra = set(model.state_dict()) - set(awake(tiny("softmax1")).state_dict())
    assert extra == {"layers.0.mixer.sink", "layers.1.mixer.sink"}
    assert extra <= set(split_parameters(model)[1])  # no weight decay: it would pull every head to softmax1
