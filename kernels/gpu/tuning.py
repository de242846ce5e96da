"""Times the candidate tiles of each Triton kernel on the GPU at hand and stores the fastest, see tiles.py.

Nothing is timed while a model runs: `preflight` and `lazypipe bench kernels --tune` call `tune` first, later
processes read the cache. The forward comes first, because its tile decides the block mask that the backward tiles read.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lazypipe.kernels.gpu.ops import triton_backward, triton_forward
from lazypipe.kernels.gpu.tiles import (
    KERNELS,
    Tile,
    cache_key,
    fits,
    forced_tiles,
    padded_dim,
    shipped_tiles,
    write_cache,
)

log = logging.getLogger(__name__)
# Which gradients isolate a kernel: dtau needs the query kernel alone, the others add their own.
GRADIENTS = {
    "query": [True, False, False, False, True],
    "key": [False, True, True, False, False],
    "bias": [False, False, False, True, False],
}


def tune(inputs: Sequence[Tensor], time_call: Callable[[Callable[[], object]], float] | None = None) -> dict[str, Tile]:
    """Fastest tile of each kernel for inputs like (q, k, v, bias, tau); written to the cache and returned.

    `time_call` returns milliseconds of a call; by default triton.testing.do_bench, a median on a CUDA device.
    A tile that does not fit the GPU's memory is passed over; RuntimeError when none fits.
    """
    q, k, v, bias, tau = (x.detach() for x in inputs)
    timer = _do_bench if time_call is None else time_call
    dim, wide = q.shape[3], q.dtype == torch.float32
    scale = dim**-0.5
    capability = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 9
    best: dict[str, Tile] = {}
    for kernel in KERNELS:
        timings: dict[Tile, float] = {}
        for tile in shipped_tiles(kernel, padded_dim(dim), wide, capability):
            if kernel != "forward" and not fits(kernel, tile, best["forward"]):
                continue
            with forced_tiles({**best, kernel: tile}):
                try:
                    timings[tile] = timer(_call(kernel, q, k, v, bias, tau, scale))
                except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
                    if not does_not_fit(error):
                        raise
        if not timings:
            raise RuntimeError(
                f"no {kernel} tile for head_dim {dim} in {q.dtype} fits this GPU; see lazypipe.kernels.gpu.tiles"
            )
        best[kernel] = min(timings, key=lambda tile: timings[tile])
        log.info("%s tile for head_dim %d: %s of %s", kernel, dim, tuple(best[kernel]), timings)
    device = torch.cuda.get_device_name(q.device) if q.is_cuda else "interpreter"
    write_cache({cache_key(kernel, dim, wide, device): tile for kernel, tile in best.items()})
    return best


def _call(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tau: Tensor, scale: float
) -> Callable[[], object]:
    if kernel == "forward":
        return lambda: triton_forward(q, k, v, bias, tau, None, 0, scale, True, False)
    _, lse, mean, _, _, words = triton_forward(q, k, v, bias, tau, None, 0, scale, True, False)
    grad_out = torch.randn_like(q)
    need = GRADIENTS[kernel]
    return lambda: triton_backward(grad_out, q, k, v, bias, tau, None, lse, mean, words, 0, scale, need)


def does_not_fit(error: BaseException) -> bool:
    """Whether a launch failed because its tile needs more memory than the GPU has."""
    return "out of resource" in str(error).lower() or isinstance(error, torch.cuda.OutOfMemoryError)


def _do_bench(call: Callable[[], object]) -> float:
    import triton.testing

    milliseconds: float = triton.testing.do_bench(call, return_mode="median")
    return milliseconds
