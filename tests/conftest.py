"""Settings every test runs under; set before torch is imported."""

import os
import signal

import pytest

# Waiting OpenMP threads sleep instead of spinning: with more runnable threads than cores this was 6 times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pytest worker per core
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# A shell that starts the suite in the background leaves SIGINT ignored; every process the tests start would inherit
# that, and those that interrupt one would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-seed", type=int, default=0, help="what happens when, in the chaos tests")


@pytest.fixture
def chaos_seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--chaos-seed"))
