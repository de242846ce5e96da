"""The most memory a piece of work takes, seen by the operating system: torch's allocations on a CPU have no counter."""

import ctypes
import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

M_MMAP_THRESHOLD = -3
STATUS = Path("/proc/self/status")
needs_linux = pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc")


def peak_mib(build: Callable[..., Callable[[], None]], *arguments: Any) -> float:
    """MiB by which the work that `build(*arguments)` returns raises the memory of a process of its own, at its peak."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch"])
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(target=_measure, args=(build, arguments, sender))
    process.start()
    sender.close()
    peak: float = receiver.recv()
    process.join()
    return peak


def _measure(build: Callable[..., Callable[[], None]], arguments: tuple[Any, ...], sender: Any) -> None:
    import torch

    torch.set_num_threads(1)
    with suppress(
        AttributeError
    ):  # glibc: what is freed goes back to the system, as on a device with its own allocator
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65_536)
    work = build(*arguments)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back to VmRSS
    work()
    sender.send((_memory("VmHWM") - before) / 1024)


def _memory(name: str) -> int:
    return int(STATUS.read_text(encoding="ascii").split(f"{name}:")[1].split()[0])
