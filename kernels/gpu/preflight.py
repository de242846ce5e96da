"""Before training on a GPU: do the Triton kernels agree with the reference, here, at this shape and dtype?"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from lazypipe.kernels import lazy_attention
from lazypipe.kernels.gpu.tiles import KERNELS, Tile, tile_for

log = logging.getLogger(__name__)
# Largest error allowed, relative to the largest entry of the float64 reference. 16-bit kernels round weights and ds to
# 8 (bfloat16) or 11 (float16) bits before their products; float32 sums about 500 terms at 2^-24 each.
BOUNDS = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
TENSORS = ("out", "dq", "dk", "dv", "dbias", "dtau")
LENGTH = 300  # two or more blocks of every tile, and no multiple of one
TAUS = (-0.93, -0.55, 0.21)
NEAR = 1e-3  # tau keeps this distance from every -p n where it can: a weight at its threshold may fall on either side


class Preflight(NamedTuple):
    """Errors relative to the largest entry of the reference, by tensor, and what was checked."""

    errors: dict[str, float]
    bound: float
    description: str


def preflight(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int, dtype: torch.dtype, *,
    device: torch.device | str = "cuda", backend: str = "triton", tune: bool = False,
) -> Preflight:  # fmt: skip
    """Compares `backend` with the float64 reference on small random inputs of the run's heads, head_dim, W, dtype.

    Output and all five gradients, plain and packed. Logs Triton version, GPU name and tiles. With `tune`, candidate
    tiles are timed and stored first. Raises ValueError for a dtype the kernels do not take, RuntimeError naming the
    tensor, its error and the bound when one is exceeded or not finite: do not train then.
    """
    if dtype not in BOUNDS:
        raise ValueError(f"dtype is {dtype}; expected float32, float16 or bfloat16")
    place = torch.device(device)
    if tune and place.type == "cuda":
        from lazypipe.kernels.gpu.tuning import tune as tune_tiles

        tune_tiles(_inputs(num_heads, num_kv_heads, head_dim, window, dtype, place, length=4096))
    description = _describe(head_dim, dtype, place, backend)
    log.info("preflight: %s", description)
    errors = dict.fromkeys(TENSORS, 0.0)
    inputs = _inputs(num_heads, num_kv_heads, head_dim, window, dtype, place, LENGTH)
    grad_out = inputs[0].flip(2)  # as random as q, and already rounded to its dtype
    for cu_seqlens in (None, torch.tensor([0, 1, 130, LENGTH], dtype=torch.int32, device=place)):
        apart = [*inputs[:4], _off_ties(inputs, cu_seqlens)]
        found = _results([x.detach().clone() for x in apart], grad_out, cu_seqlens, backend)
        expected = _results([x.detach().double() for x in apart], grad_out, cu_seqlens, "reference")
        for name, x, y in zip(TENSORS, found, expected, strict=True):
            error = float((x.double() - y).abs().max() / y.abs().max().clamp(min=1e-3))
            errors[name] = max(errors[name], error) if error == error else float("inf")
    log.info("preflight: largest relative errors %s, bound %.0e", errors, BOUNDS[dtype])
    for name, error in errors.items():
        if not error <= BOUNDS[dtype]:
            raise RuntimeError(
                f"preflight: {name} of backend {backend!r} is off by {error:.2e} of its largest entry, bound "
                f"{BOUNDS[dtype]:.0e} ({description}); do not train with it: choose another backend or Triton version"
            )
    return Preflight(errors, BOUNDS[dtype], description)


def _inputs(
    heads: int, heads_kv: int, dim: int, window: int, dtype: torch.dtype, device: torch.device, length: int
) -> list[Tensor]:
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    tau = torch.tensor([TAUS[h % len(TAUS)] for h in range(heads)], device=device)
    q, k, v = (draw(1, h, length, dim).to(dtype) for h in (heads, heads_kv, heads_kv))
    return [q, k, v, draw(heads, window), tau]


def _off_ties(inputs: list[Tensor], cu_seqlens: Tensor | None) -> Tensor:
    """tau moved, per head, to the middle of the widest nearby gap between the values of -p n."""
    q, k, _, bias, tau = (x.double() for x in inputs)
    heads, length = q.shape[1], q.shape[2]
    # The reference at tau = 0 has weights p, and identity values read them out row by row.
    identity = torch.eye(length, dtype=torch.float64, device=q.device).expand(1, heads, -1, -1)
    padded_q = torch.nn.functional.pad(q, (0, length - q.shape[3])) if length > q.shape[3] else q
    padded_k = torch.nn.functional.pad(k.repeat_interleave(heads // k.shape[1], 1), (0, padded_q.shape[3] - k.shape[3]))
    values = torch.nn.functional.pad(identity, (0, padded_q.shape[3] - length))
    probs = lazy_attention(
        padded_q, padded_k, values, bias, torch.zeros_like(tau),
        cu_seqlens=cu_seqlens, scale=q.shape[3] ** -0.5, backend="reference",
    )  # fmt: skip
    counts = (probs > 0).sum(-1, keepdim=True)
    moved = []
    for h in range(heads):
        ratios = -(probs * counts)[0, h][probs[0, h] > 0]
        center = float(tau[h])
        near = ratios[(ratios - center).abs() < 50 * NEAR].sort().values
        edges = torch.cat([near.new_tensor([center - 50 * NEAR]), near, near.new_tensor([center + 50 * NEAR])])
        widest = int((edges[1:] - edges[:-1]).argmax())
        moved.append(float((edges[widest] + edges[widest + 1]) / 2))
    return torch.tensor(moved, device=q.device)


def _results(inputs: list[Tensor], grad_out: Tensor, cu_seqlens: Tensor | None, backend: str) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in inputs]
    out = lazy_attention(*leaves, cu_seqlens=cu_seqlens, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


def _describe(head_dim: int, dtype: torch.dtype, device: torch.device, backend: str) -> str:
    parts = [f"backend {backend}", f"head_dim {head_dim}", str(dtype), f"torch {torch.__version__}"]
    if backend == "triton":
        import triton

        tiles: dict[str, Tile] = {kernel: tile_for(kernel, head_dim, dtype, device) for kernel in KERNELS}
        parts += [f"triton {triton.__version__}", f"tiles { ({k: tuple(t) for k, t in tiles.items()}) }"]
    parts.append(torch.cuda.get_device_name(device) if device.type == "cuda" else str(device))
    return ", ".join(parts)
