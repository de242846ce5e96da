"""Small random problems, and how far a backend is from the float64 reference on them.

Errors are the largest difference relative to the largest entry of the reference; inf where a result is not finite.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lazypipe.kernels.api import lazy_attention
from lazypipe.kernels.gpu.tiles import DECODE_ROWS

# Largest error allowed. 16-bit kernels round weights and ds to 8 (bfloat16) or 11 (float16) bits before their products;
# float32 sums about 500 terms at 2^-24 each.
BOUNDS = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
TRAINING = ("out", "dq", "dk", "dv", "dbias", "dtau")
INFERENCE = ("out", "decode")
TAUS = (-0.93, -0.55, 0.21)
NEAR = 1e-3  # tau keeps this distance from every -p n where it can: a weight at its threshold may fall on either side
DECODED = 3  # queries decoded at once, fewer where a group has many heads


class Problem(NamedTuple):
    """Arguments of `lazypipe.kernels.lazy_attention` (batch of one), and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    tau: Tensor
    grad_out: Tensor
    cu_seqlens: Tensor | None


def draw_problem(
    heads: int, heads_kv: int, head_dim: int, window: int, dtype: torch.dtype, device: torch.device, query_len: int,
    key_len: int | None = None, documents: list[int] | None = None,
) -> Problem:  # fmt: skip
    """q, k, v and bias are N(0, 1), from seed 0; tau is TAUS, moved off ties. `documents`: where packed ones begin."""
    generator = torch.Generator(device=device).manual_seed(0)
    key_len = query_len if key_len is None else key_len

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q = draw(1, heads, query_len, head_dim).to(dtype)
    k, v = (draw(1, heads_kv, key_len, head_dim).to(dtype) for _ in range(2))
    bias = draw(heads, window)
    tau = torch.tensor([TAUS[h % len(TAUS)] for h in range(heads)], device=device)
    borders = None
    if documents is not None:
        borders = torch.tensor([*documents, query_len], dtype=torch.int32, device=device)
    grad_out = q.flip(2)  # as random as q, and already rounded to its dtype
    problem = Problem(q, k, v, bias, tau, grad_out, borders)
    return problem._replace(tau=_off_ties(problem))


def training_errors(problem: Problem, backend: str) -> dict[str, float]:
    """Error of the output and of all five gradients, by the names of TRAINING."""
    inputs, borders = problem[:5], problem.cu_seqlens
    found = _results([x.detach().clone() for x in inputs], problem.grad_out, borders, backend)
    expected = _results([x.detach().double() for x in inputs], problem.grad_out, borders, "reference")
    return {name: _error(x, y) for name, x, y in zip(TRAINING, found, expected, strict=True)}


def inference_errors(problem: Problem, backend: str) -> dict[str, float]:
    """Error of the output without gradients and, unless documents are packed, of decoding the last few queries."""
    q, k, v, bias, tau, _, borders = problem
    with torch.no_grad():
        expected = lazy_attention(*(x.double() for x in problem[:5]), cu_seqlens=borders, backend="reference")
        errors = {"out": _error(lazy_attention(q, k, v, bias, tau, cu_seqlens=borders, backend=backend), expected)}
        if borders is None:
            last = max(1, min(DECODED, DECODE_ROWS // (q.shape[1] // k.shape[1])))
            decoded = lazy_attention(q[:, :, -last:], k, v, bias, tau, backend=backend)
            errors["decode"] = _error(decoded, expected[:, :, -last:])
    return errors


def largest(*errors: dict[str, float]) -> dict[str, float]:
    """The largest error of each name."""
    names = dict.fromkeys(name for one in errors for name in one)
    return {name: max(one[name] for one in errors if name in one) for name in names}


def _error(x: Tensor, y: Tensor) -> float:
    error = float((x.double() - y).abs().max() / y.abs().max().clamp(min=1e-3))
    return error if error == error else float("inf")


def _results(inputs: list[Tensor], grad_out: Tensor, cu_seqlens: Tensor | None, backend: str) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in inputs]
    out = lazy_attention(*leaves, cu_seqlens=cu_seqlens, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


def _off_ties(problem: Problem) -> Tensor:
    """tau moved, per head, to the middle of the widest nearby gap between the values of -p n."""
    q, k, _, bias, tau = (x.double() for x in problem[:5])
    heads, key_len, dim = q.shape[1], k.shape[2], q.shape[3]
    # The reference at tau = 0 has weights p, and identity values read them out row by row.
    width = max(key_len, dim)
    identity = torch.eye(key_len, dtype=torch.float64, device=q.device).expand(1, heads, -1, -1)
    probs = lazy_attention(
        F.pad(q, (0, width - dim)), F.pad(k.repeat_interleave(heads // k.shape[1], 1), (0, width - dim)),
        F.pad(identity, (0, width - key_len)), bias, torch.zeros_like(tau),
        cu_seqlens=problem.cu_seqlens, scale=dim**-0.5, backend="reference",
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
