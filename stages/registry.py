"""Every stage's Config by name, and the Configs of the short stages. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lazypipe.stages.config import StageConfig, operational
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.tokenization.config import TokenizeConfig


class SparsityConfig(StageConfig):
    """What the attention weights look like on held-out text."""

    STAGE_VERSION: ClassVar[int] = 1

    windows: int = Field(16, gt=0, description="validation windows analysed")
    seq_len: int = Field(256, gt=1, description="tokens per window")
    query_block: int = operational(128, gt=0, description="query rows materialised at a time")
    heat_map_heads: int = Field(4, ge=0, description="heads per layer shown as attention heat maps (first window)")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype")


class ReportConfig(StageConfig):
    """One page for the whole experiment."""

    STAGE_VERSION: ClassVar[int] = 1

    title: str = operational("experiment", description="heading of the page; default: the experiment's name")
    compare_with: Literal["deconstructing"] | None = Field(
        None, description="published figures to set the results beside: deconstructing (arXiv 2510.11602, 500M)"
    )


STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "tokenize": TokenizeConfig,
    "pretrain": PretrainConfig,
    "evaluate": EvaluateConfig,
    "sparsity": SparsityConfig,
    "report": ReportConfig,
}
