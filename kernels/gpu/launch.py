"""Allocates outputs, picks tiles and launches the Triton kernels. Tensors in, tensors out; no autograd here."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lazypipe.kernels.gpu.backward import key_kernel, query_kernel
from lazypipe.kernels.gpu.bias_grad import bias_kernel
from lazypipe.kernels.gpu.forward import forward_kernel
from lazypipe.kernels.gpu.tiles import Tile, keep_values, padded_dim, product_precision, separate_outputs, tile_for
from lazypipe.kernels.gpu.toeplitz import bias_gradient, bias_tiles, tile_count, tile_step
from lazypipe.kernels.reference import LOG2_E, document_starts

BIAS_PROGRAMS = 1024  # programs of the bias gradient; a few for each of the 108 (A100) or 132 (H100) multiprocessors


class Forward(NamedTuple):
    """What a forward leaves behind. lse is in log2 units; entries that were not asked for are empty."""

    out: Tensor
    lse: Tensor
    mean: Tensor
    mass: Tensor
    used: Tensor
    words: Tensor


def mask_shape(query_len: int, key_len: int, tile: Tile) -> tuple[int, int]:
    """(query blocks, int32 words) of one head's block mask."""
    return (query_len + tile.block_m - 1) // tile.block_m, (key_len + 32 * tile.block_n - 1) // (32 * tile.block_n)


def precision(kernel: str, x: Tensor) -> str:
    """The PRECISION of a kernel's products for inputs like x [.., D], see `tiles.product_precision`."""
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        return "upcast"
    return product_precision(kernel, padded_dim(x.shape[-1]), x.dtype == torch.float32)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current CUDA device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rows_contiguous(x: Tensor) -> Tensor:
    """Kernels take any strides but want the head dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def require_layout(name: str, x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """x, which a kernel indexes by its shape alone; RuntimeError when it is not contiguous or not of that shape."""
    if (shape is not None and x.shape != torch.Size(shape)) or not x.is_contiguous():
        expected = list(x.shape if shape is None else shape)
        raise RuntimeError(
            f"{name} has shape {list(x.shape)} and strides {list(x.stride())}; the kernel reads it as a contiguous "
            f"{expected}: a fault of whoever made it"
        )
    return x


def require_rows(name: str, x: Tensor) -> Tensor:
    """x [.., D], of which a kernel takes every stride but the last; RuntimeError when that one is not 1."""
    if x.stride(-1) != 1:
        raise RuntimeError(f"{name} has strides {list(x.stride())}; the kernel expects a last one of 1")
    return x


def first_keys(cu_seqlens: Tensor | None, query_len: int, unused: Tensor) -> Tensor:
    """int32 [Lq]: first position of each query's document; `unused` stands in where nothing is packed."""
    if cu_seqlens is None:
        return unused
    return require_layout("first", document_starts(cu_seqlens, query_len).to(torch.int32), (query_len,))


def options(tile: Tile) -> dict[str, Any]:
    """Launch options. Fused multiply-adds are asked for by name: Triton 3.10 is to turn them off by default."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tau: Tensor, cu_seqlens: Tensor | None, offset: int, scale: float,
    training: bool, stats: bool,
) -> Forward:  # fmt: skip
    """Shapes as in `kernels.lazy_attention`; `training` also saves M_i = sum_j p_ij k_j [B, Hq, Lq, D] in float32."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, heads, query_len, dim = q.shape
    heads_kv, key_len = k.shape[1:3]
    window, shift = bias.shape[1], key_len - query_len
    tile = tile_for("forward", dim, q.dtype, q.device)
    blocks, num_words = mask_shape(query_len, key_len, tile)
    first = first_keys(cu_seqlens, query_len, q)
    table = require_layout("bias tiles", bias_tiles(bias, shift, tile.block_m, tile.block_n))

    def row_floats(wanted: bool) -> Tensor:
        return torch.empty(q.shape[:3] if wanted else (0,), dtype=torch.float32, device=q.device)

    result = Forward(
        out=torch.empty(q.shape, dtype=q.dtype, device=q.device),
        lse=row_floats(True),
        mean=torch.empty(q.shape if training else (0,), dtype=torch.float32, device=q.device),
        mass=row_floats(stats),
        used=row_floats(stats),
        words=torch.zeros(batch, heads, blocks, num_words, dtype=torch.int32, device=q.device),
    )
    with on_device(q):
        forward_kernel[(blocks, batch * heads)](
            q, k, v, table, require_layout("tau", tau.contiguous(), (heads,)), first, *result,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            heads, heads // heads_kv, query_len, key_len, offset, window, table.shape[1], num_words, scale * LOG2_E,
            D=dim, DP=padded_dim(dim), BM=tile.block_m, BN=tile.block_n, STEP=tile_step(tile.block_m, tile.block_n),
            WORDS=triton.next_power_of_2(num_words), PACKED=cu_seqlens is not None, TRAINING=training, STATS=stats,
            PRECISION=precision("forward", q), **options(tile),
        )  # fmt: skip
    return result


class Saved(NamedTuple):
    """What the backward kernels share."""

    grad_out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    tau: Tensor
    cu_seqlens: Tensor | None
    lse: Tensor
    mean: Tensor
    words: Tensor
    offset: int
    scale: float


def _check(s: Saved, mask_tile: Tile) -> None:
    """RuntimeError for the first tensor that is not laid out as every backward kernel reads it."""
    heads = s.q.shape[1]
    for name, x in (("q", s.q), ("k", s.k), ("v", s.v), ("grad_out", s.grad_out)):
        require_rows(name, x)
    require_layout("bias", s.bias, (heads, s.bias.shape[1]))
    require_layout("tau", s.tau, (heads,))
    require_layout("lse", s.lse, s.q.shape[:3])
    # Also met by a forward tile that is not the one the mask was written with.
    require_layout("mask words", s.words, (*s.q.shape[:2], *mask_shape(s.q.shape[2], s.k.shape[2], mask_tile)))


def launch_query(s: Saved, need_dq: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, or an empty tensor; D_i [B, Hq, Lq]; sum_j m_ij dO_i.v_j / n_i [B, Hq, Lq])."""
    batch, heads, query_len, dim = s.q.shape
    key_len, group = s.k.shape[2], heads // s.k.shape[1]
    tile, mask_tile = (tile_for(kernel, dim, s.q.dtype, s.q.device) for kernel in ("query", "forward"))
    _check(s, mask_tile)
    if need_dq:
        require_layout("mean", s.mean, s.q.shape)
    first = first_keys(s.cu_seqlens, query_len, s.q)
    table = require_layout("bias tiles", bias_tiles(s.bias, key_len - query_len, tile.block_m, tile.block_n))
    dq = torch.empty(s.q.shape if need_dq else (0,), dtype=s.q.dtype, device=s.q.device)
    delta, da_sum = torch.empty_like(s.lse), torch.empty_like(s.lse)
    with on_device(s.q):
        query_kernel[(triton.cdiv(query_len, tile.block_m), batch * heads)](
            s.q, s.k, s.v, s.grad_out, table, s.tau, first, s.lse, s.mean, s.words, dq, delta, da_sum,
            *s.q.stride()[:3], *s.k.stride()[:3], *s.v.stride()[:3], *s.grad_out.stride()[:3],
            heads, group, query_len, key_len, s.offset, s.bias.shape[1], table.shape[1], s.words.shape[3],
            s.words.shape[2], s.scale * LOG2_E, s.scale,
            D=dim, DP=padded_dim(dim), BM=tile.block_m, BN=tile.block_n, STEP=tile_step(tile.block_m, tile.block_n),
            MM=mask_tile.block_m, PACKED=s.cu_seqlens is not None, NEED_DQ=need_dq,
            PRECISION=precision("query", s.q), **options(tile),
        )  # fmt: skip
    return dq, delta, da_sum


def launch_key(s: Saved, delta: Tensor, need_dk: bool, need_dv: bool) -> tuple[Tensor, Tensor]:
    """(dk, dv); one that is not needed is empty."""
    batch, heads, query_len, dim = s.q.shape
    heads_kv, key_len = s.k.shape[1:3]
    tile, mask_tile = (tile_for(kernel, dim, s.q.dtype, s.q.device) for kernel in ("key", "forward"))
    _check(s, mask_tile)
    require_layout("delta", delta, s.lse.shape)
    first, end = first_keys(s.cu_seqlens, query_len, s.q), s.q
    if s.cu_seqlens is not None:
        positions = torch.arange(query_len, device=s.q.device)
        ends = s.cu_seqlens[torch.searchsorted(s.cu_seqlens.to(torch.int64), positions, right=True)]
        end = require_layout("end", ends, (query_len,))
    table = bias_tiles(s.bias, key_len - query_len, tile.block_m, tile.block_n, transposed=True)
    require_layout("bias tiles", table)
    dk = torch.empty(s.k.shape if need_dk else (0,), dtype=s.k.dtype, device=s.q.device)
    dv = torch.empty(s.v.shape if need_dv else (0,), dtype=s.v.dtype, device=s.q.device)
    wanted = [(need_dk, need_dv)]
    if need_dk and need_dv and separate_outputs(padded_dim(dim), s.q.dtype == torch.float32):
        wanted = [(True, False), (False, True)]
    for want_dk, want_dv in wanted:
        with on_device(s.q):
            key_kernel[(triton.cdiv(key_len, tile.block_n), batch * heads_kv)](
                s.q, s.k, s.v, s.grad_out, table, s.tau, first, end, s.lse, delta, s.words, dk, dv,
                *s.q.stride()[:3], *s.k.stride()[:3], *s.v.stride()[:3], *s.grad_out.stride()[:3],
                heads_kv, heads // heads_kv, query_len, key_len, s.offset, s.bias.shape[1], table.shape[1],
                s.words.shape[3], s.words.shape[2], s.scale * LOG2_E, s.scale,
                D=dim, DP=padded_dim(dim), BM=tile.block_m, BN=tile.block_n, STEP=tile_step(tile.block_m, tile.block_n),
                MM=mask_tile.block_m, MN=mask_tile.block_n, PACKED=s.cu_seqlens is not None, NEED_DK=want_dk,
                NEED_DV=want_dv, PRECISION=precision("dk" if want_dk else "dv", s.q),
                KEEP_V=keep_values(padded_dim(dim), s.q.dtype == torch.float32),
                **options(tile),
            )  # fmt: skip
    return dk, dv


def launch_bias(s: Saved, delta: Tensor) -> Tensor:
    """dbias [Hq, W], float32."""
    batch, heads, query_len, dim = s.q.shape
    key_len, group, window = s.k.shape[2], heads // s.k.shape[1], s.bias.shape[1]
    tile, mask_tile = (tile_for(kernel, dim, s.q.dtype, s.q.device) for kernel in ("bias", "forward"))
    size, shift = tile.block_m, key_len - query_len
    reach = min(window, key_len)
    differences = tile_count(reach, shift, size, size)
    first_delta = shift % size - size
    slices = max(1, min(batch * triton.cdiv(query_len, size), BIAS_PROGRAMS // (heads * differences)))
    _check(s, mask_tile)
    require_layout("delta", delta, s.lse.shape)
    first = first_keys(s.cu_seqlens, query_len, s.q)
    sums = torch.empty(heads, differences, slices, size, size, dtype=torch.float32, device=s.q.device)
    with on_device(s.q):
        bias_kernel[(differences, slices, heads)](
            s.q, s.k, s.v, s.grad_out, s.bias, s.tau, first, s.lse, delta, s.words, sums,
            *s.q.stride()[:3], *s.k.stride()[:3], *s.v.stride()[:3], *s.grad_out.stride()[:3],
            batch, heads, group, query_len, key_len, s.offset, window, s.words.shape[3], s.words.shape[2],
            first_delta, s.scale * LOG2_E,
            D=dim, DP=padded_dim(dim), T=size, MM=mask_tile.block_m, MN=mask_tile.block_n,
            PACKED=s.cu_seqlens is not None, PRECISION=precision("bias", s.q), **options(tile),
        )  # fmt: skip
    return bias_gradient(sums.sum(2), first_delta, size, window)
