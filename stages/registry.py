"""Every stage's Config by name. Imports no torch."""

from __future__ import annotations

from lazypipe.stages.config import StageConfig
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.report.config import ReportConfig
from lazypipe.stages.sparsity.config import SparsityConfig
from lazypipe.stages.tokenization.config import TokenizeConfig

STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "tokenize": TokenizeConfig,
    "pretrain": PretrainConfig,
    "evaluate": EvaluateConfig,
    "sparsity": SparsityConfig,
    "report": ReportConfig,
}
