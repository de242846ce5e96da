"""Independent tasks side by side, one core each: what keeps a CPU's cores from waiting for one another.

torch divides every operation among its threads and waits for the slowest of them, several thousand times per call of
the blockwise backend. Beside a training run on the same two cores that took 5.9 and 6.7 times torch's fused softmax
attention (forward and backward, L = 2048, B 1, H 8, D 64, float32), where lanes took 1.2 and 1.4 times.
A lane is a Python thread whose operations run on one core; torch releases the interpreter lock inside them.
"""

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

# A lane whose operation has ended waits so long, in seconds, for the interpreter before it asks the other to give way.
# Python's 5 ms are the length of ten operations: L = 8192 with few full blocks took 1.14 times as long.
SWITCH_INTERVAL = 1e-4


def run_side_by_side(tasks: Sequence[Callable[[], None]]) -> None:
    """Runs tasks that touch no common memory, without gradients, on as many cores as torch may use here.

    Every task runs on one core, so its result does not depend on the others; with fewer tasks than cores they run one
    after the other, each on all cores. The first exception is raised again here.
    """
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def run(task: Callable[[], None]) -> None:  # modes belong to a thread: a lane starts without them
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
            task()

    if threads == 1 or len(tasks) < threads:
        for task in tasks:
            run(task)
    else:
        with _quick_switching():
            list(_lanes(threads).map(run, tasks))


_switching = threading.Lock()
_callers = 0
_interval_before = 0.0


@contextmanager
def _quick_switching() -> Iterator[None]:
    """Python's switch interval is SWITCH_INTERVAL while any caller is inside, and then what it was before the first."""
    global _callers, _interval_before
    with _switching:
        if _callers == 0:
            _interval_before = sys.getswitchinterval()
            sys.setswitchinterval(min(_interval_before, SWITCH_INTERVAL))
        _callers += 1
    try:
        yield
    finally:
        with _switching:
            _callers -= 1
            if _callers == 0:
                sys.setswitchinterval(_interval_before)


@functools.cache
def _lanes(count: int) -> ThreadPoolExecutor:
    started = threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # torch gives a thread the common count at its first question: later it would undo this
        torch.set_num_threads(1)  # for this thread, as OpenMP and MKL count by thread, and for threads yet to ask
        started.wait()

    lanes = ThreadPoolExecutor(count, thread_name_prefix="attention-lane", initializer=begin)
    for _ in range(count):
        lanes.submit(int)
    started.wait()
    torch.set_num_threads(count)  # what threads yet to ask will find
    return lanes


os.register_at_fork(after_in_child=_lanes.cache_clear)  # threads do not survive a fork: the child starts its own
