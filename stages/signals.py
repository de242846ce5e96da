"""Signals of this process, handled for a while."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BOTH = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handled_signals(handle: Callable[[int], None], numbers: tuple[int, ...] = BOTH) -> Iterator[None]:
    """Inside, `handle(number)` is called for these signals; afterwards the handlers are those of before.

    For the main thread: Python lets no other set handlers (ValueError).
    """
    previous = {number: signal.signal(number, lambda caught, _frame: handle(caught)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set from Python
