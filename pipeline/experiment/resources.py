"""The section `resources` of an experiment file: what each stage occupies while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, create_model, field_validator

from lazypipe.stages.config import StageConfig
from lazypipe.stages.stage_row import StageRow


class StageResources(StageConfig):
    """What one execution of a stage occupies."""

    cpus: float | None = Field(None, gt=0, description="CPU cores held; default: 1, for tokenize all of the machine")
    gpus: float = Field(0, ge=0, description="GPUs held")
    threads: int | None = Field(None, gt=0, description="torch threads; default: the CPU cores held")


class WorkerResources(StageConfig):
    """What a stage on workers occupies: one without a GPU runs inside the stage task, all else through Ray Train."""

    workers: int | dict[str, int] = Field(
        1,
        description="data-parallel workers; {min: 1, max: 4}: as many as there is room for, now and whenever "
        "`resize_interval_s` looks again",
    )
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each worker")
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores of each Ray Train worker")
    cpus: float | None = Field(
        None, gt=0, description="CPU cores held by training inside the stage task; default: all of the machine"
    )
    threads: int | None = Field(None, gt=0, description="torch threads of a worker; default: its CPU cores")
    max_failures: int = Field(3, ge=0, description="worker failures Ray Train recovers from before giving up")
    placement: Literal["PACK", "SPREAD"] = Field(
        "PACK", description="workers on as few nodes as possible, or on as many"
    )
    resize_interval_s: float = Field(
        60, gt=0, description="of a range of workers: seconds between looks for room for more"
    )

    @field_validator("workers", mode="plain")
    @classmethod
    def _check_workers(cls, value: Any) -> int | dict[str, int]:
        """A number, or a range that holds more than one."""
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError(f"must be greater than 0, found {value}")
            return value
        if not isinstance(value, Mapping) or set(value) != {"min", "max"}:
            raise ValueError(f"must be a number such as 2, or a range such as {{min: 1, max: 4}}, found {value!r}")
        low, high = value["min"], value["max"]
        if type(low) is not int or type(high) is not int or not 1 <= low <= high:
            raise ValueError(f"must have whole numbers 1 <= min <= max, found min={low!r}, max={high!r}")
        return low if low == high else {"min": low, "max": high}

    @property
    def worker_range(self) -> tuple[int, int]:
        """(fewest, most) workers."""
        if isinstance(self.workers, int):
            return self.workers, self.workers
        return self.workers["min"], self.workers["max"]

    @property
    def in_task(self) -> bool:
        return self.workers == 1 and self.gpus_per_worker == 0


def resources_type(row: StageRow) -> type[StageResources] | type[WorkerResources]:
    """Which fields the resources of a stage have."""
    return WorkerResources if row.on_workers else StageResources


def resources_model(rows: Iterable[StageRow]) -> type[StageConfig]:
    """The schema of the section: a field for each stage."""
    fields: dict[str, Any] = {
        row.name: (resources_type(row), Field(resources_type(row)(), description=row.description)) for row in rows
    }
    return create_model("Resources", __base__=StageConfig, **fields)
