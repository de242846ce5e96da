"""Lanes: the blockwise backend's tasks on cores of their own, with nothing else to notice."""

import functools
import sys
import threading
from typing import Any

import pytest
import torch

from lazypipe.kernels import lazy_attention
from lazypipe.kernels.cpu.lanes import SWITCH_INTERVAL, run_side_by_side
from tests.kernels.problems import make_problem, run


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_each_task_runs_on_one_core_and_the_caller_keeps_its_threads():
    seen = []
    meeting = threading.Barrier(2)

    def task():
        meeting.wait(timeout=10)  # only tasks that run at the same time get past
        seen.append((threading.current_thread().name, torch.get_num_threads()))

    run_side_by_side([task, task])
    assert len({name for name, _ in seen}) == 2
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == 2
    fresh = []
    other = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert fresh == [2]


def test_fewer_tasks_than_cores_keep_all_cores():
    seen = []
    run_side_by_side([lambda: seen.append((threading.current_thread().name, torch.get_num_threads()))])
    assert seen == [(threading.current_thread().name, 2)]


def test_an_error_in_a_lane_is_raised_and_the_switch_interval_is_what_it_was():
    before, inside = sys.getswitchinterval(), []

    def broken():
        inside.append(sys.getswitchinterval())
        raise ArithmeticError("in a lane")

    with pytest.raises(ArithmeticError, match="in a lane"):
        run_side_by_side([broken, broken, broken])
    assert inside[0] == pytest.approx(SWITCH_INTERVAL)
    assert sys.getswitchinterval() == before > SWITCH_INTERVAL


def test_callers_that_overlap_leave_the_switch_interval_as_it_was():
    before, meeting = sys.getswitchinterval(), threading.Barrier(2)

    def caller():
        meet: Any = functools.partial(meeting.wait, timeout=10)
        run_side_by_side([meet, lambda: None])

    callers = [threading.Thread(target=caller) for _ in range(2)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert sys.getswitchinterval() == before


def test_modes_reach_the_lanes():
    p = make_problem(6, heads_kv=4, query_len=150, taus=(-1.0, 0.2))
    expected = lazy_attention(*p.inputs)
    with torch.inference_mode():
        assert torch.equal(lazy_attention(*[x.clone() for x in p.inputs]), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lazy_attention(*p.inputs), expected), "autocast must not round what is float32 inside"


def test_lanes_change_no_result_and_repeat_bitwise():
    """More heads than cores, of unequal density, several batches: order and place of a task must not matter."""
    p = make_problem(7, batch=3, heads_kv=3, group=2, query_len=700, window=40, taus=(-1.0, 0.2, -3.0))
    first = run(p, "blockwise")
    for _ in range(3):
        for x, y in zip(run(p, "blockwise"), first, strict=True):
            assert torch.equal(x, y)
    torch.set_num_threads(1)
    for x, y in zip(run(p, "blockwise"), first, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
