"""The report stage's Config."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lazypipe.stages.config import StageConfig, operational


class ReportConfig(StageConfig):
    """One page for the whole experiment."""

    STAGE_VERSION: ClassVar[int] = 1

    title: str = operational("experiment", description="heading of the page; default: the experiment's name")
    compare_with: Literal["deconstructing"] | None = Field(
        None, description="published figures to set the results beside: deconstructing (arXiv 2510.11602, 500M)"
    )
