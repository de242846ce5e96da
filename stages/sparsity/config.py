"""The sparsity stage's Config."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lazypipe.stages.config import StageConfig, operational


class SparsityConfig(StageConfig):
    """What the attention weights look like on held-out text."""

    STAGE_VERSION: ClassVar[int] = 1

    windows: int = Field(16, gt=0, description="validation windows analysed")
    seq_len: int = Field(256, gt=1, description="tokens per window")
    query_block: int = operational(128, gt=0, description="query rows materialised at a time")
    heat_map_heads: int = Field(4, ge=0, description="heads per layer shown as attention heat maps (first window)")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype")
