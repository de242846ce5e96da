"""The timer: turns, warm-up, and an interval that holds the median as often as it says."""

import functools
import random
import time

from lazypipe.pipeline.bench.timing import Ratio, interleaved, interval_rank, ratio, timed


def test_alternatives_take_turns_and_the_first_round_does_not_count() -> None:
    called: list[str] = []

    def measure(name: str, seconds: float) -> float:
        called.append(name)
        return seconds * len(called)

    times = interleaved({"a": lambda: measure("a", 1.0), "b": lambda: measure("b", 2.0)}, 3)
    assert called == ["a", "b"] * 4
    assert times.seconds == {"a": [3.0, 5.0, 7.0], "b": [8.0, 12.0, 16.0]}
    assert times.median("b") == 12.0
    assert times.ratio("b", "a") == Ratio(12 / 5, 16 / 7, 8 / 3, [16 / 7, 12 / 5, 8 / 3])
    assert times.ratio("b", "a").text(2) == "2.40 (2.29-2.67)"


def test_the_calls_of_one_measure_come_in_turn_and_only_they_are_timed() -> None:
    called: list[int] = []
    measure = timed([functools.partial(called.append, i) for i in range(3)], prepare=lambda: time.sleep(0.05))
    times = interleaved({"x": measure}, 5, warm_up=2)
    assert called == [0, 1, 2, 0, 1, 2, 0]
    assert 0 <= times.median("x") < 0.05
    assert timed(lambda: time.sleep(0.02))() >= 0.02


def test_the_interval_of_a_median_holds_it_as_often_as_it_says() -> None:
    """Ranks worked out by hand from binomial sums, and coverage over 4000 samples of a skewed distribution."""
    assert [interval_rank(count) for count in (2, 6, 9, 10, 12, 20)] == [1, 1, 2, 2, 3, 6]
    rng, held = random.Random(0), 0
    for _ in range(4000):
        found = ratio([rng.expovariate(1.0) for _ in range(10)], [1.0] * 10)
        held += found.low <= 0.6931 <= found.high
    assert 0.97 < held / 4000 < 0.99  # 97.85 % for 10 values: the ranks are whole numbers
    assert ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0]) == Ratio(2.0, 2.0, 3.0, [2.0, 2.0, 3.0])
