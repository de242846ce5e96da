"""Where every weight starts. Each tensor draws from its own generator, seeded by (seed, its name).

So two models that differ in a mechanism start from the same values wherever they share a parameter: a Lazy and a
standard model of one seed have equal projections, and a difference between their curves is not one of luck.
"""

import hashlib

import torch
from torch import Tensor, nn

from lazypipe.model.config import ModelConfig
from lazypipe.model.side_sequence import RANDOM_STD

RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")


def initialise_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter in place, drawn on the CPU in float32 whatever the device. Norms keep their ones.

    Matrices ~ N(0, init_std); those that write into the residual stream are divided by sqrt(2 num_layers), so that its
    variance does not grow with depth (GPT-2). Lazy: bias ~ N(0, bias_init_std), tau = tau_init.
    The random side sequence of random_qk ~ N(0, 0.02). The sink logit starts at 0, the learnable sigmoid bias at its
    constant.
    """
    for name, buffer in model.named_buffers():
        if name == "side.vectors":
            fill_normal(buffer, RANDOM_STD, seed, name)
    residual_std = config.init_std / (2 * config.num_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith("mixer.tau"):
            nn.init.constant_(parameter, config.tau_init)
        elif name.endswith("mixer.sink"):
            nn.init.zeros_(parameter)
        elif name.endswith("mixer.logit_bias"):
            nn.init.constant_(parameter, config.initial_sigmoid_bias)
        elif name.endswith("mixer.bias"):
            fill_normal(parameter, config.bias_init_std, seed, name)
        else:
            std = residual_std if name.endswith(RESIDUAL_PROJECTIONS) else config.init_std
            fill_normal(parameter, std, seed, name)


def fill_normal(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """parameter ~ N(0, std^2) in place, from a generator of its own."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    with torch.no_grad():
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
