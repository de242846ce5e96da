"""Before a GPU computes with the Triton kernels: do they agree with the reference, here, at this shape and dtype?"""

import functools
import logging
from typing import NamedTuple

import torch

from lazypipe.kernels.gpu.tiles import KERNELS, Tile, decode_tile, padded_dim, tile_for
from lazypipe.kernels.oracle import (
    BOUNDS,
    INFERENCE,
    TRAINING,
    draw_problem,
    inference_errors,
    largest,
    training_errors,
)

log = logging.getLogger(__name__)
LENGTH = 300  # two or more blocks of every tile, and no multiple of one
DOCUMENTS = [0, 1, 130]  # where packed ones begin: one of a single token, borders inside blocks


class PreflightError(RuntimeError):
    """The kernels are wrong here; a restart would not help."""


class Preflight(NamedTuple):
    """Errors relative to the largest entry of the reference, by tensor, and what was checked."""

    errors: dict[str, float]
    bound: float
    description: str


def preflight(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int, dtype: torch.dtype, *,
    device: torch.device | str = "cuda", backend: str = "triton", tune: bool = False, inference: bool = False,
) -> Preflight:  # fmt: skip
    """Compares `backend` with the float64 reference on small random inputs of the run's heads, head_dim, W, dtype.

    Plain and packed: output and all five gradients, or with `inference` the output without gradients and decoding.
    Logs Triton version, GPU name and tiles. With `tune`, candidate tiles are timed and stored first. Raises ValueError
    for a dtype the kernels do not take, PreflightError naming the tensor, its error and the bound when one is exceeded
    or not finite: do not compute with them then.
    """
    if dtype not in BOUNDS:
        raise ValueError(f"dtype is {dtype}; expected float32, float16 or bfloat16")
    place = torch.device(device)
    shape = (num_heads, num_kv_heads, head_dim, window, dtype, place)
    if tune and place.type == "cuda":
        from lazypipe.kernels.gpu.tuning import tune as tune_tiles

        tune_tiles(draw_problem(*shape, 4096)[:5])
    description = _describe(head_dim, dtype, place, backend, inference)
    log.info("preflight: %s", description)
    compare, names = (inference_errors, INFERENCE) if inference else (training_errors, TRAINING)
    problems = (draw_problem(*shape, LENGTH), draw_problem(*shape, LENGTH, documents=DOCUMENTS))
    errors = largest(dict.fromkeys(names, 0.0), *(compare(problem, backend) for problem in problems))
    log.info("preflight: largest relative errors %s, bound %.0e", errors, BOUNDS[dtype])
    for name, error in errors.items():
        if not error <= BOUNDS[dtype]:
            raise PreflightError(
                f"preflight: {name} of backend {backend!r} is off by {error:.2e} of its largest entry, bound "
                f"{BOUNDS[dtype]:.0e} ({description}); do not compute with it: use another Triton version or a CPU, "
                "in training also pretrain.kernel=reference"
            )
    return Preflight(errors, BOUNDS[dtype], description)


@functools.cache
def inference_preflight(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int, dtype: torch.dtype, device: torch.device
) -> Preflight:
    """`preflight` of what a trained model runs, once per process for each shape, dtype and device."""
    return preflight(num_heads, num_kv_heads, head_dim, window, dtype, device=device, inference=True)


def _describe(head_dim: int, dtype: torch.dtype, device: torch.device, backend: str, inference: bool) -> str:
    parts = [f"backend {backend}", f"head_dim {head_dim}", str(dtype), f"torch {torch.__version__}"]
    if backend == "triton":
        import triton

        kernels = KERNELS[:1] if inference else KERNELS
        tiles: dict[str, Tile] = {kernel: tile_for(kernel, head_dim, dtype, device) for kernel in kernels}
        if inference:
            tiles["decode"] = decode_tile(padded_dim(head_dim), dtype == torch.float32)
        parts += [f"triton {triton.__version__}", f"tiles { ({k: tuple(t) for k, t in tiles.items()}) }"]
    parts.append(torch.cuda.get_device_name(device) if device.type == "cuda" else str(device))
    return ", ".join(parts)
