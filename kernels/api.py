"""`lazy_attention`: checks its arguments once and hands them to a backend."""

import functools
import importlib.util
import itertools
import math
import os
from typing import Literal, overload

import torch
from torch import Tensor

from lazypipe.kernels.cpu.blockwise import blockwise
from lazypipe.kernels.cpu.strips import BLOCK
from lazypipe.kernels.gpu.ops import active_blocks, triton_decode, triton_forward
from lazypipe.kernels.gpu.tiles import DECODE_ROWS, tile_for
from lazypipe.kernels.reference import document_starts, lazy_attention_reference
from lazypipe.kernels.stats import LazyStats

BACKENDS = ("auto", "reference", "blockwise", "triton")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def lazy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    tau: Tensor,
    *,
    cu_seqlens: Tensor | None = ...,
    position_offset: int = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def lazy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    tau: Tensor,
    *,
    cu_seqlens: Tensor | None = ...,
    position_offset: int = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, LazyStats]: ...
def lazy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    tau: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    position_offset: int = 0,
    scale: float | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LazyStats]:
    """Causal attention with a learnable distance bias and Elastic-Softmax (Lazy Attention, arXiv 2601.00919).

        s_ij = scale q_i.k_j + bias_h[i - j] (0 beyond W)      p_i = softmax over j <= i of s_ij
        a_ij = max(p_ij + tau_h / n_i, 0)                      o_i = sum_j a_ij v_j

    n_i is the number of tokens query i may attend to, its own included. The paper's v1 writes `- tau / n`
    with tau = +1; here, as in the authors' released code, tau is added and starts at -1.

    q             [B, Hq, Lq, D], k and v [B, Hkv, Lk, D]: float32, bfloat16 or float16 (float64: not in triton),
                  rotary embedding already applied, any strides, Lq <= Lk, Hq a multiple of Hkv.
    bias          [Hq, W], tau [Hq]: float32 (float64 beside float64 inputs); they lose their updates in less.
    cu_seqlens    int32 [N + 1], 0 = first <= ... <= last = Lq = Lk: N documents packed in a batch of one. n_i and i - j
                  count inside a document, and nothing attends across.
    position_offset  number of leading keys that were evicted from k and v: query i stands at
                  position_offset + (Lk - Lq) + i, and n_i counts the evicted keys.
    scale         of the dot products, 1 / sqrt(D) when None.
    backend       auto (triton on CUDA, blockwise elsewhere), reference, blockwise or triton.
    return_stats  also return a `lazypipe.kernels.stats.LazyStats`, which carries no gradient.

    Returns the output [B, Hq, Lq, D] in q's dtype, or (output, stats). Differentiable in q, k, v, bias and tau, once.
    Results repeat bitwise on the same device: no kernel uses atomics, and every reduction has a fixed order.
    Raises ValueError or TypeError naming the argument that does not fit.
    """
    check_arguments(q, k, v, bias, tau, cu_seqlens, position_offset, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend == "auto":
        backend = "triton" if uses_triton(backend, q.shape[3], q.dtype, q.device) else "blockwise"
    if backend == "triton":
        _check_triton(q)
        return _triton(q, k, v, bias, tau, cu_seqlens, position_offset, scale, return_stats)
    if backend == "reference":
        out, stats = lazy_attention_reference(q, k, v, bias, tau, cu_seqlens, position_offset, scale)
    else:
        out, lse, mass, sparsity, mask = blockwise(q, k, v, bias, tau, cu_seqlens, position_offset, scale, return_stats)
        stats = LazyStats((lse * math.log(2.0)).float(), mass, sparsity, mask, (BLOCK, BLOCK))
    return (out, stats) if return_stats else out


def _triton(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tau: Tensor, cu_seqlens: Tensor | None, offset: int, scale: float,
    return_stats: bool,
) -> Tensor | tuple[Tensor, LazyStats]:  # fmt: skip
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias, tau))
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    if rows <= DECODE_ROWS and cu_seqlens is None and not differentiable and not return_stats:
        decoded: Tensor = triton_decode(q, k, v, bias, tau, offset, scale)[0]
        return decoded
    training = differentiable and q.requires_grad  # dq alone needs M_i
    out: Tensor
    out, lse, _, mass, used, words = triton_forward(
        q, k, v, bias, tau, cu_seqlens, offset, scale, training, return_stats
    )
    if not return_stats:
        return out
    tile = tile_for("forward", q.shape[3], q.dtype, q.device)
    key_blocks = -(-k.shape[2] // tile.block_n)
    visible = torch.arange(1, q.shape[2] + 1, device=q.device) + (k.shape[2] - q.shape[2])
    if cu_seqlens is not None:
        visible = visible - document_starts(cu_seqlens, q.shape[2])
    stats = LazyStats(
        lse * math.log(2.0), mass, 1.0 - used / visible, active_blocks(words, key_blocks), (tile.block_m, tile.block_n)
    )
    return out, stats


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _suits_triton(head_dim: int, dtype: torch.dtype) -> bool:
    return dtype != torch.float64 and 16 <= head_dim <= 256


def uses_triton(backend: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `lazy_attention` runs the Triton kernels on such inputs."""
    if backend == "auto":
        return device.type == "cuda" and _has_triton() and _suits_triton(head_dim, dtype)
    return backend == "triton"


def _check_triton(q: Tensor) -> None:
    if not _has_triton():
        raise ValueError("backend is 'triton' and triton is not installed; install it or use backend='blockwise'")
    if not _suits_triton(q.shape[3], q.dtype):
        raise ValueError(
            f"q is {q.dtype} with head_dim {q.shape[3]}; expected float32, bfloat16 or float16 and 16..256 for "
            "backend='triton'; use backend='blockwise'"
        )
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"q is on {q.device}; expected a CUDA device for backend='triton' (or TRITON_INTERPRET=1 before triton is "
            "imported, to run the kernels in its interpreter); use backend='blockwise'"
        )


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tau: Tensor, cu_seqlens: Tensor | None, offset: int, backend: str
) -> None:
    """Raises one clear error for the first argument of `lazy_attention` that does not fit."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    for name, x, rank in (("q", q, 4), ("k", k, 4), ("v", v, 4), ("bias", bias, 2), ("tau", tau, 1)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; expected a torch.Tensor")
        if x.dim() != rank:
            raise ValueError(f"{name} has shape {list(x.shape)}; expected {rank} dimensions")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}; move them to one device")
    _check_dtypes(q, k, v, bias, tau)
    batch, heads, query_len, dim = q.shape
    if k.shape != v.shape:
        raise ValueError(f"k has shape {list(k.shape)} and v {list(v.shape)}; expected equal shapes")
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"k has shape {list(k.shape)}; expected [{batch}, Hkv, Lk, {dim}] to go with q {list(q.shape)}"
        )
    if min(q.numel(), k.numel()) == 0:
        raise ValueError(f"q has shape {list(q.shape)} and k {list(k.shape)}; expected no empty dimension")
    if heads % k.shape[1]:
        raise ValueError(f"q has {heads} heads and k {k.shape[1]}; expected a multiple (grouped-query attention)")
    if query_len > k.shape[2]:
        raise ValueError(f"q has {query_len} positions and k {k.shape[2]}; expected Lq <= Lk, as attention is causal")
    if bias.shape[0] != heads or bias.shape[1] < 1:
        raise ValueError(
            f"bias has shape {list(bias.shape)}; expected [{heads}, W] with W >= 1 to go with q's {heads} heads"
        )
    if tau.shape[0] != heads:
        raise ValueError(f"tau has shape {list(tau.shape)}; expected [{heads}], one per query head")
    if isinstance(offset, int) and offset < 0:
        raise ValueError(f"position_offset is {offset}; expected the number of evicted keys, at least 0")
    if cu_seqlens is not None:
        _check_documents(q, k, cu_seqlens, offset)


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tau: Tensor) -> None:
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"q has dtype {q.dtype}; expected float32, bfloat16, float16 or float64")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype} and q {q.dtype}; cast them to one dtype")
    expected = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, x in (("bias", bias), ("tau", tau)):
        if x.dtype != expected:
            raise TypeError(f"{name} has dtype {x.dtype}; expected {expected} beside q in {q.dtype}: keep it uncast")


def _check_documents(q: Tensor, k: Tensor, cu_seqlens: Tensor, offset: int) -> None:
    length = q.shape[2]
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; expected int32 [documents + 1]")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and q on {q.device}; move them to one device")
    if q.shape[0] != 1:
        raise ValueError(
            f"q has batch size {q.shape[0]}; expected 1 with cu_seqlens, documents packed along the length"
        )
    if k.shape[2] != length:
        raise ValueError(f"k has {k.shape[2]} positions and q {length}; expected as many with cu_seqlens")
    if offset != 0:
        raise ValueError(f"position_offset is {offset}; expected 0 with cu_seqlens")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():  # reading values would stall a GPU
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != length or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"cu_seqlens is {ends}; expected a rising list from 0 to {length}, the length of q")
