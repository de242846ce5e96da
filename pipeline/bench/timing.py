"""Medians of interleaved timings, and peak memory."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def one_time(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call: CUDA events on a GPU, wall clock on a CPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def interleaved_medians(calls: dict[str, list[Callable[[], Any]]], repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds per name. Each round times every name once on one input set, so noise falls on all alike."""
    for steps in calls.values():
        steps[0]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats):
        for name, steps in calls.items():
            times[name].append(one_time(steps[i % len(steps)], device))
    return {name: statistics.median(values) for name, values in times.items()}


def measured_peak(warm_up: Callable[[], Any], call: Callable[[], Any], device: str) -> float:
    """MB by which `call` raises the peak above what is held before; on a CPU of this process, so use a new one."""
    warm_up()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    before = _peak_bytes()
    call()
    return (_peak_bytes() - before) / 1e6


def _peak_bytes() -> float:
    """Largest resident size of this process so far. On Linux not ru_maxrss: a child inherits its parent's there."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return float(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
