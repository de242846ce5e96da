"""`pretrain.deterministic`: the same bits from the same run on the same GPU, at the price of some speed.

It is operational like `kernel` and the number of workers: it picks among ways to compute the same thing. On a CPU a run
repeats itself bit for bit with and without it, and Lazy Attention's kernels have no reduction without a fixed order on
any device; on CUDA torch's own operations (embedding gradients, cuBLAS with several streams, attention's backward pass)
may differ from run to run unless they are told not to.
"""

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import torch

from lazypipe.model.mixers.registry import mechanism
from lazypipe.stages.contract import UserError, Warn
from lazypipe.stages.pretrain.config import PretrainConfig

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_SETTINGS = (":4096:8", ":16:8")  # those with which cuBLAS promises to repeat itself


@contextmanager
def deterministic(asked: bool, mixer: str, warn: Warn) -> Iterator[None]:
    """Inside, torch raises where an operation cannot repeat itself; nothing happens unless `asked`.

    UserError where cuBLAS can no longer be set up for it; a warning for a baseline, whose kernels are not ours.
    """
    if not asked:
        yield
        return
    if torch.cuda.is_available():
        prepare_cublas(os.environ, torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    if mechanism(mixer).whole_model:
        warn(
            f"deterministic=true: whether the kernels of mixer={mixer} repeat themselves is up to "
            "flash-linear-attention"
        )
    with _deterministic_algorithms():
        yield


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    """torch raises where an operation cannot repeat itself; the settings are put back afterwards."""
    algorithms, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic


def prepare_worker(config: PretrainConfig) -> None:
    """In a worker process with a GPU, before CUDA is used: prepare cuBLAS when `config` says deterministic."""
    if config.deterministic and torch.cuda.is_available():
        prepare_cublas(os.environ, False)


def prepare_cublas(environment: MutableMapping[str, str], initialized: bool) -> None:
    """Give cuBLAS the workspace with which it repeats itself; UserError when it is too late or set to another."""
    value = environment.get(CUBLAS)
    if value in CUBLAS_SETTINGS:
        return
    if value is not None or initialized:
        state = f"is {value!r}" if value is not None else "is not set, and this process uses CUDA already"
        raise UserError(
            f"deterministic=true: {CUBLAS} {state}; start with {CUBLAS}=:4096:8 in the environment, or set "
            "deterministic: false"
        )
    environment[CUBLAS] = CUBLAS_SETTINGS[0]
