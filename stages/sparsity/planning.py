"""What planning asks about a SparsityConfig: its windows. Imports no torch."""

from __future__ import annotations

from lazypipe.stages.sparsity.config import SparsityConfig
from lazypipe.stages.stage_row import Window


def windows(config: SparsityConfig) -> list[Window]:
    """The windows it analyses."""
    return [Window("sparsity.seq_len", "validation", config.seq_len)]


def model_lengths(config: SparsityConfig) -> list[tuple[str, int]]:
    """(key, tokens) of every text that passes through the model at once."""
    return [("sparsity.seq_len", config.seq_len)]
