"""A signal reaches the handler while it is handled, and whoever handled it before afterwards."""

import signal

import pytest

from lazypipe.stages.signals import handled_signals


def test_signals_are_handled_inside_and_as_before_outside() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    inner, outer = list[int](), list[int]()
    with handled_signals(outer.append):
        with pytest.raises(RuntimeError), handled_signals(inner.append, (signal.SIGTERM,)):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError
        signal.raise_signal(signal.SIGTERM)
    assert (inner, outer) == ([signal.SIGTERM], [signal.SIGINT, signal.SIGTERM])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
