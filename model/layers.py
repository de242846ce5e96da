"""The plain parts of the transformer: linear maps, embeddings, RMSNorm, SwiGLU; and where every weight starts.

A module that owns parameters has a method `initialise(draw)`, which fills them, and names in `undecayed` those that
AdamW does not decay. Each tensor is drawn from its own generator, seeded by (seed, its name). So two models that differ
in a mechanism start from the same values wherever they share a parameter: a lazy and a standard model of one seed have
equal projections, and a difference between their curves is not one of luck.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Draw:
    """Fills the tensors of `module`, whose name in the model is `name`, from `seed`.

    std: of a matrix. residual_std: of a matrix that writes into the residual stream. filled: names of what is filled.
    """

    module: nn.Module
    name: str
    seed: int
    std: float
    residual_std: float
    filled: set[str] = field(default_factory=set)

    def normal(self, tensor: str, std: float) -> None:
        """module.tensor ~ N(0, std^2), drawn on the CPU in float32 whatever the device."""
        digest = hashlib.sha256(f"{self.seed}/{self.full_name(tensor)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        target = self._tensor(tensor)
        with torch.no_grad():
            target.copy_(torch.empty(target.shape).normal_(0.0, std, generator=generator))

    def constant(self, tensor: str, value: float) -> None:
        """module.tensor = value everywhere."""
        with torch.no_grad():
            self._tensor(tensor).fill_(value)

    def full_name(self, tensor: str) -> str:
        """The name in the model of module.tensor."""
        return f"{self.name}.{tensor}" if self.name else tensor

    def _tensor(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.module.get_submodule(owner), leaf)
        self.filled.add(self.full_name(name))
        return tensor


def initialise_weights(modules: Iterable[tuple[str, nn.Module]], seed: int, std: float, num_layers: int) -> None:
    """Let each module of (name, module) fill its tensors in place.

    Matrices ~ N(0, std^2); those that write into the residual stream are divided by sqrt(2 num_layers), so that its
    variance does not grow with depth (GPT-2). Raises TypeError for a parameter that no module has filled.
    """
    filled: set[str] = set()
    owned: dict[str, nn.Module] = {}
    for name, module in reversed(list(modules)):  # a mixer after its projections, so that it has the last word
        draw = Draw(module, name, seed, std, std / (2 * num_layers) ** 0.5, filled)
        owned |= {draw.full_name(leaf): module for leaf, _ in module.named_parameters(recurse=False)}
        initialise = getattr(module, "initialise", None)
        if initialise is not None:
            initialise(draw)
    for name, module in owned.items():
        if name not in filled:
            raise TypeError(
                f"parameter {name} of {type(module).__name__} has no initial value; give it one in the method "
                "initialise(draw) of the mixer, or use Linear of lazypipe.model.layers"
            )


class Linear(nn.Linear):
    """x [..., in] -> x W^T [..., out], no bias. Weights stay uninitialised until `initialise_weights`.

    into_residual: the result is added to the residual stream.
    """

    def __init__(self, in_features: int, out_features: int, into_residual: bool = False) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.into_residual = into_residual

    def reset_parameters(self) -> None:
        """Nothing: torch's default would be overwritten, and it draws from the global random state."""

    def initialise(self, draw: Draw) -> None:
        draw.normal("weight", draw.residual_std if self.into_residual else draw.std)


class Embedding(nn.Embedding):
    """Token ids int64 [...] -> vectors [..., hidden]. Uninitialised like `Linear`."""

    def reset_parameters(self) -> None:
        """Nothing, as in `Linear`."""

    def initialise(self, draw: Draw) -> None:
        draw.normal("weight", draw.std)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019); weight starts at one."""

    undecayed: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)

    def initialise(self, draw: Draw) -> None:
        draw.constant("weight", 1.0)


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)) (Shazeer 2020, eq. 6), no biases. x [..., hidden] -> [..., hidden]."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, mlp_size)
        self.up_proj = Linear(hidden_size, mlp_size)
        self.down_proj = Linear(mlp_size, hidden_size, into_residual=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
