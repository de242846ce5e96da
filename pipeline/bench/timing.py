"""The timer of every benchmark: alternatives take turns, and are compared within a round; and peak memory.

On a machine that does other things too, what disturbs one round disturbs all alternatives of it alike. So a ratio is
taken within a round, and what is given is the median of the rounds' ratios with an interval.
"""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """The median of the rounds' ratios and a 95 % interval of it; `all` of them, sorted."""

    median: float
    low: float
    high: float
    all: list[float]

    def text(self, digits: int) -> str:
        """'0.98 (0.97-1.01)'"""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass
class Timings:
    """Seconds of every round by the name of the alternative."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, one_round: Mapping[str, float]) -> None:
        for name, value in one_round.items():
            self.seconds.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> Ratio:
        """Seconds of `name` / seconds of `base`: below 1 where `name` is faster."""
        return ratio(self.seconds[name], self.seconds[base])


def interleaved(measures: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> Timings:
    """Call every measure once a round, in order; each returns its seconds. The first `warm_up` rounds do not count."""
    timings = Timings()
    for number in range(warm_up + rounds):
        one_round = {name: measure() for name, measure in measures.items()}
        if number >= warm_up:
            timings.add(one_round)
    return timings


def timed(
    call: Callable[[], Any] | Sequence[Callable[[], Any]],
    device: str = "cpu",
    prepare: Callable[[], object] = lambda: None,
) -> Callable[[], float]:
    """A measure for `interleaved`: the seconds of `call`, by CUDA events on a GPU and by the wall clock on a CPU.

    call: several of them, such as one per input set, are called in turn. prepare: called before, and not timed.
    """
    calls = [call] if callable(call) else list(call)
    count = 0

    def measure() -> float:
        nonlocal count
        chosen = calls[count % len(calls)]
        count += 1
        prepare()
        return _seconds_on_gpu(chosen) if device == "cuda" else _seconds(chosen)

    return measure


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _seconds_on_gpu(call: Callable[[], Any]) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def ratio(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """Of two alternatives' times of the same rounds."""
    ratios = sorted(a / b for a, b in zip(times, base, strict=True))
    rank = interval_rank(len(ratios))
    return Ratio(statistics.median(ratios), ratios[rank - 1], ratios[-rank], ratios)


def interval_rank(count: int) -> int:
    """The k for which the k-th smallest and k-th largest of `count` values enclose their median with 95 % confidence.

    From the sign test, so nothing is assumed of the distribution: P(Binomial(count, 1/2) < k) <= 2.5 %. At least 1: the
    smallest and the largest of fewer than 6 values enclose it with less confidence.
    """
    rank, below = 0, 0.0
    while (below := below + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    return max(1, rank)


def measured_peak(warm_up: Callable[[], Any], call: Callable[[], Any], device: str) -> float:
    """MB by which `call` raises the peak above what is held before; on a CPU of this process, so use a new one."""
    import torch

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
