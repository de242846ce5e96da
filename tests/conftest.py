"""Settings every test runs under; set before torch is imported."""

import os

# Waiting OpenMP threads sleep instead of spinning: with more runnable threads than cores this was 6 times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pytest worker per core
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
