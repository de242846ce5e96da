"""Baselines in the stages: a machine that cannot build or compute one gets a sentence before any work."""

from pathlib import Path

import torch

from lazypipe.model.baselines import BaselineError, check_baseline
from lazypipe.model.checkpoint import Checkpoint, load_checkpoint
from lazypipe.model.config import ModelConfig
from lazypipe.stages.contract import UserError


def refuse_baseline(model: ModelConfig, device: torch.device) -> None:
    """UserError when `model` is a baseline and its package, or a GPU for it, is missing here."""
    try:
        check_baseline(model, device)
    except BaselineError as error:
        raise UserError(str(error)) from error


def load_model(directory: Path, device: torch.device) -> Checkpoint:
    """`load_checkpoint`, whose BaselineError becomes a UserError."""
    try:
        return load_checkpoint(directory, device)
    except BaselineError as error:
        raise UserError(str(error)) from error
