"""The plain parts of the transformer: linear maps and embeddings (filled by `initialise_weights`), RMSNorm, SwiGLU."""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x [..., in] -> x W^T [..., out], no bias. Weights stay uninitialised until `initialise_weights` fills them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: torch's default would be overwritten, and it draws from the global random state."""


class Embedding(nn.Embedding):
    """Token ids int64 [...] -> vectors [..., hidden]. Uninitialised like `Linear`."""

    def reset_parameters(self) -> None:
        """Nothing, as in `Linear`."""


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019); weight starts at one."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)) (Shazeer 2020, eq. 6), no biases. x [..., hidden] -> [..., hidden]."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, mlp_size)
        self.up_proj = Linear(hidden_size, mlp_size)
        self.down_proj = Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
