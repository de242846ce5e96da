"""AdamW's groups and updates, and its state by name."""

from typing import Any

import pytest
import torch

from lazypipe.model.config import ModelConfig
from lazypipe.model.transformer import Transformer
from lazypipe.stages.pretrain.checks import warn_of_settings
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.optimizer import build_optimizer, set_learning_rate, split_parameters

LAZY = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, mixer="lazy", max_bias_length=4, tie_embeddings=False)


def test_matrices_decay_and_norms_tau_and_bias_do_not() -> None:
    model = Transformer(LAZY, 11)
    decayed, others = split_parameters(model)
    projections = [f"layers.0.mixer.{name}_proj.weight" for name in "qkvo"]
    mlp = [f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert set(decayed) == {"embedding.weight", "head.weight", *projections, *mlp}
    norms = {"layers.0.mixer_norm.weight", "layers.0.mlp_norm.weight", "final_norm.weight"}
    assert set(others) == norms | {"layers.0.mixer.tau", "layers.0.mixer.bias"}
    config = PretrainConfig(model=LAZY, weight_decay=0.5, lr=0.1)
    optimizer = build_optimizer(model, config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if name in decayed else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


def test_tau_and_bias_learn_at_their_own_rate() -> None:
    """AdamW's first update of a fresh gradient is the rate, whatever the gradient: weights tell the rate they saw."""
    config = PretrainConfig(model=LAZY.model_copy(update={"pattern": "even", "num_layers": 2}), weight_decay=0.0)
    model = Transformer(config.model, 11)
    optimizer = build_optimizer(model, config.model_copy(update={"tau_bias_lr_multiplier": 5.0}))
    set_learning_rate(optimizer, 0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    apart = {name for name in before if name.endswith(("tau", "bias"))}
    assert len(apart) == 2
    for name, parameter in model.named_parameters():
        step = torch.full_like(parameter, 0.05 if name in apart else 0.01)
        torch.testing.assert_close(before[name] - parameter.detach(), step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("fields", "groups"), [({}, 2), ({"tau_bias_lr_multiplier": 2.0}, 3)])
def test_only_a_rate_of_their_own_takes_a_group(fields: dict[str, float], groups: int) -> None:
    config = PretrainConfig.model_validate({"model": LAZY, **fields})
    optimizer = build_optimizer(Transformer(LAZY, 11), config)
    assert len(optimizer.param_groups) == groups


@pytest.mark.parametrize("model", [{"mixer": "standard"}, {"mixer": "lazy", "lazy_bias": False, "lazy_elastic": False}])
def test_a_rate_for_nothing_is_said(model: dict[str, object]) -> None:
    config = PretrainConfig.model_validate({"model": model, "tau_bias_lr_multiplier": 2.0})
    with pytest.warns(UserWarning, match="tau_bias_lr_multiplier=2 .* has none"):
        warn_of_settings(config)
    assert len(build_optimizer(Transformer(config.model, 11), config).param_groups) == 2


def test_an_update_is_adamw_by_the_book() -> None:
    """Three steps against Loshchilov and Hutter's Algorithm 2 in float64."""
    config = PretrainConfig(model=LAZY, lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.95, adam_eps=1e-8)
    model = Transformer(LAZY, 11)
    optimizer = build_optimizer(model, config)
    weight = model.layers[0].mixer.q_proj.weight
    m: Any = 0.0
    v: Any = 0.0
    value = weight.detach().double()
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 4):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        gradient = weight.grad.double()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        adam = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        value = value - 0.01 * (adam + 0.1 * value)
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), value, rtol=1e-5, atol=1e-7)
