"""CPU, memory, disk, network and GPU of the driver's machine beside a training run's curves, by MLflow's own monitor.

A sample every 10 s (MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL), metrics named system/...; a run shorter than that has
none. MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false turns it off. GPUs are read through nvidia-ml-py. On a cluster this is
the machine the driver runs on; what the workers' GPUs do is in mfu and peak_memory_gb, which the workers log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # mlflow takes seconds to import; a cached run never needs it
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

PREFIX = "system/"


def watch_machine(run_id: str, uri: str) -> SystemMetricsMonitor | None:
    """A started monitor that goes on after the last sample the run has; None when the environment says no."""
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING as SWITCH
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    if SWITCH.is_set() and not SWITCH.get():
        return None
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor
