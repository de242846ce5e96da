"""AdamW's groups and updates, and its state by name."""

import torch

from model.config import ModelConfig
from model.transformer import Transformer
from stages.optimizer import build_optimizer, optimizer_tensors, restore_optimizer, split_parameters
from stages.pretrain_config import PretrainConfig

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


def test_an_update_is_adamw_by_the_book() -> None:
    """Three steps against Loshchilov and Hutter's Algorithm 2 in float64."""
    config = PretrainConfig(model=LAZY, lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.95, adam_eps=1e-8)
    model = Transformer(LAZY, 11)
    optimizer = build_optimizer(model, config)
    weight = model.layers[0].mixer.q_proj.weight
    value, m, v = weight.detach().double(), 0.0, 0.0
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


def test_state_survives_a_round_trip_bit_for_bit() -> None:
    config = PretrainConfig(model=LAZY)

    def advance(model: Transformer, optimizer: torch.optim.AdamW, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    first, second = Transformer(LAZY, 11), Transformer(LAZY, 11, seed=1)
    optimizer, other = build_optimizer(first, config), build_optimizer(second, config)
    assert optimizer_tensors(optimizer, first) == {}
    advance(first, optimizer, 0)
    second.load_state_dict(first.state_dict())
    restore_optimizer(other, second, {n: t.clone() for n, t in optimizer_tensors(optimizer, first).items()})
    advance(first, optimizer, 1)
    advance(second, other, 1)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
