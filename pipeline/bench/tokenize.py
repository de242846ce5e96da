"""`lazypipe bench tokenize`: tokenization.py with its workers in Ray tasks, as the pipeline has them."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Sequence

from lazypipe.pipeline.bench.tokenization import bench, parse
from lazypipe.pipeline.execution.backends import map_with_ray


def bench_tokenize(arguments: Sequence[str]) -> None:
    """Start Ray, measure, print; --json writes the numbers to a file too."""
    options = parse(arguments)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (15 by default: no loop is to be nicer)
    os.environ.pop("RAY_ADDRESS", None)
    began = time.perf_counter()
    import ray

    ray.init(address="local", num_cpus=options.processes, include_dashboard=False, logging_level="WARNING")
    start_s = time.perf_counter() - began
    try:
        found = bench(options, map_with_ray, start_s)
    finally:
        ray.shutdown()
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
