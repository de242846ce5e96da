"""Peers in the stages: a machine that cannot build or compute one gets a sentence before any work."""

from pathlib import Path

import torch

from lazypipe.model.baselines import PeerError, check_peer
from lazypipe.model.checkpoint import Checkpoint, load_checkpoint
from lazypipe.model.config import ModelConfig
from lazypipe.stages.contract import Refusal


def refuse_peer(model: ModelConfig, device: torch.device) -> None:
    """Refusal when `model` is a peer and its package, or a GPU for it, is missing here."""
    try:
        check_peer(model, device)
    except PeerError as error:
        raise Refusal(str(error)) from error


def load_model(directory: Path, device: torch.device) -> Checkpoint:
    """`load_checkpoint`, whose PeerError becomes a Refusal."""
    try:
        return load_checkpoint(directory, device)
    except PeerError as error:
        raise Refusal(str(error)) from error
