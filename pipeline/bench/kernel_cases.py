"""What the benchmark runs: problems with a dial over block sparsity, and the implementations that are compared."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lazypipe.kernels import lazy_attention

# A learned-looking steep head: this much extra score on near keys makes every far weight fall below 1 / n even at
# L = 64k (a far weight then needs a score 9 standard deviations up to survive).
STEEP_BIAS = 16.0
STEEP_REACH = 32  # distances that get it, before a quick decay


class Inputs(NamedTuple):
    """One input set; q, k, v, bias and tau are leaves that require grad unless the case is inference."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    tau: Tensor
    grad_out: Tensor


class Peer(NamedTuple):
    """An implementation: how to call it, and which of the five inputs it differentiates."""

    name: str
    call: Callable[[Inputs], Tensor]
    differentiates: int


def make_inputs(
    seed: int, batch: int, heads: int, query_len: int, key_len: int, head_dim: int, window: int, steep_share: float,
    dtype: torch.dtype, device: torch.device, training: bool,
) -> Inputs:  # fmt: skip
    """Random q, k, v; `steep_share` of the heads attend locally (nearly all far blocks empty), the rest are flat."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(length: int) -> Tensor:
        x = torch.randn(batch, heads, length, head_dim, generator=generator, device=device, dtype=torch.float32)
        return x.to(dtype).requires_grad_(training)

    distance = torch.arange(window, device=device)
    steep = STEEP_BIAS * torch.where(distance < STEEP_REACH, 1.0, torch.exp((STEEP_REACH - distance) / 4.0))
    bias = torch.zeros(heads, window, device=device)
    bias[: round(steep_share * heads)] = steep
    tau = torch.full((heads,), -1.0, device=device)
    grad_out = torch.randn(batch, heads, query_len, head_dim, generator=generator, device=device).to(dtype)
    return Inputs(
        draw(query_len),
        draw(key_len),
        draw(key_len),
        bias.requires_grad_(training),
        tau.requires_grad_(training),
        grad_out,
    )


def lazy_peer(backend: str) -> Peer:
    """One of our own backends."""
    return Peer(backend, lambda x: lazy_attention(x.q, x.k, x.v, x.bias, x.tau, backend=backend), 5)


def sdpa_peer(name: str, backend: SDPBackend | None, causal: bool) -> Peer:
    """torch's softmax attention, through one of its backends (None: torch's own choice)."""

    def call(x: Inputs) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=causal)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=causal)

    return Peer(name, call, 3)


def flex_peer(length: int, device: torch.device) -> Peer:
    """FlexAttention, causal softmax, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=str(device))  # noqa: ARG005

    def call(x: Inputs) -> Tensor:
        out: Tensor = compiled(x.q, x.k, x.v, block_mask=mask)
        return out

    return Peer("flex", call, 3)


def adasplash_peer() -> Peer:
    """AdaSplash (entmax-1.5), when the package is installed."""
    adasplash = importlib.import_module("adasplash")

    def call(x: Inputs) -> Tensor:
        out: Tensor = adasplash.adasplash(x.q, x.k, x.v, alpha=1.5, is_causal=True)
        return out

    return Peer("adasplash", call, 3)


def outside_peer(specification: str) -> Peer:
    """`module:function`, called as function(q, k, v, bias, tau). Raises ValueError when it is not of that form."""
    module, colon, function = specification.partition(":")
    if not (module and colon and function):
        raise ValueError(f"peer is {specification!r}; expected module:function, called with (q, k, v, bias, tau)")
    target = getattr(importlib.import_module(module), function)
    return Peer(specification, lambda x: target(x.q, x.k, x.v, x.bias, x.tau), 5)


def peers_for(device: torch.device, length: int, decode: bool, outside: list[str]) -> list[Peer]:
    """Everything worth comparing on this device. One that cannot run says so when it is first called."""
    peers = [lazy_peer("triton"), lazy_peer("reference")] if device.type == "cuda" else []
    if device.type == "cuda":
        peers += [
            sdpa_peer(f"sdpa-{name}", backend, not decode)
            for name, backend in (
                ("flash", SDPBackend.FLASH_ATTENTION),
                ("cudnn", SDPBackend.CUDNN_ATTENTION),
                ("math", SDPBackend.MATH),
            )
        ]
        if not decode:
            peers.append(flex_peer(length, device))
            if importlib.util.find_spec("adasplash") is not None:
                peers.append(adasplash_peer())
    else:
        peers = [lazy_peer("blockwise"), lazy_peer("reference"), sdpa_peer("sdpa", None, not decode)]
    return peers + [outside_peer(name) for name in outside]
