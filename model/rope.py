"""Rotary position embedding (Su et al. 2021, eq. 34), half-split: dimension i is rotated together with i + head_dim/2.

This is the convention of Llama checkpoints. The interleaved one, pairing 2i with 2i + 1, is the same model with the
rows of the query and key projections permuted.
"""

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]


def rope_tables(first_position: int, length: int, head_dim: int, theta: float, device: torch.device) -> Rope:
    """(cos, sin), each float32 [length, head_dim/2], of positions first_position ... first_position + length - 1.

    The angle is position * theta^(-2i/head_dim). It is formed in float64: in float32 it would be off by up to 4e-3
    radians at position 100,000.
    """
    positions = torch.arange(first_position, first_position + length, dtype=torch.float64, device=device)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    angles = positions[:, None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def apply_rope(x_BHLD: Tensor, rope: Rope) -> Tensor:
    """Rotate queries or keys [B, H, L, D] by their positions; same shape and dtype, contiguous."""
    cos, sin = rope
    first, second = x_BHLD.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BHLD.dtype)
