"""Settings every test runs under; set before torch is imported."""

import os

# Waiting OpenMP threads sleep instead of spinning: with more runnable threads than cores this was 6 times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
