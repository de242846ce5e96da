"""A trained model on disk: weights, shape and tokenizer. Nothing in it is ever unpickled.

model.safetensors   float32 weights by parameter name, and the side sequence of a model that has one
config.json         {"model": fields of ModelConfig, "vocab_size", "eos_id"}
tokenizer.json      for tokenizers.Tokenizer.from_file
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lazypipe.model.baselines import build_model
from lazypipe.model.config import ModelConfig
from lazypipe.model.transformer import Transformer

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: names the file or tensor, what was found and what was expected."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model. eos_id: the token that ends every document and starts an unprompted continuation."""

    model: Transformer
    vocab_size: int
    eos_id: int
    directory: Path

    @property
    def tokenizer_path(self) -> Path:
        """tokenizer.json, which a checkpoint saved without a tokenizer lacks."""
        return self.directory / TOKENIZER_FILE


def save_checkpoint(
    directory: Path,
    model: Transformer,
    eos_id: int,
    tokenizer_json: Path | None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the files of the module docstring into `directory`, which is made if need be.

    weights: those of a model whose parameters are sharded, put together; default: the model's own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict() if weights is None else weights
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in weights.items()}
    save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {"model": model.config.model_dump(), "vocab_size": model.vocab_size, "eos_id": eos_id}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if tokenizer_json is not None:
        shutil.copyfile(tokenizer_json, directory / TOKENIZER_FILE)


def load_checkpoint(directory: Path, device: torch.device | str = "cpu", kernel: str = "auto") -> Checkpoint:
    """The model in `directory`, on `device`, in eval mode. kernel: backend of Lazy Attention.

    Raises CheckpointError when a file is missing or unreadable, or weights do not fit the configuration; BaselineError
    for a baseline without its package.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} is no model checkpoint: {name} is missing; "
                f"expected {CONFIG_FILE} and {WEIGHTS_FILE}, as written by the pretrain stage"
            )
    try:
        stored = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        config = ModelConfig.model_validate(stored["model"])
        vocab_size, eos_id = int(stored["vocab_size"]), int(stored["eos_id"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE} is not a model configuration: {error!r}") from error
    try:
        weights = load_file(directory / WEIGHTS_FILE)
    except SafetensorError as error:
        raise CheckpointError(f"{directory / WEIGHTS_FILE} is not a readable safetensors file: {error}") from error
    if config.mechanism.whole_model:  # it holds tensors that are in no checkpoint, so they have to be made
        model = build_model(config, vocab_size)
    else:
        with torch.device("meta"):
            model = Transformer(config, vocab_size, kernel=kernel)
    check_weights(model, weights, directory / WEIGHTS_FILE)
    model.load_state_dict(weights, assign=True)
    return Checkpoint(model.to(device).eval(), vocab_size, eos_id, directory)


def check_weights(model: Transformer, weights: dict[str, Tensor], source: Path) -> None:
    """Raise CheckpointError for the first tensor of `weights` that is not the model's by name, shape and dtype."""
    expected = model.state_dict()
    for name, parameter in expected.items():
        shape, dtype = list(parameter.shape), parameter.dtype
        if name not in weights:
            raise CheckpointError(f"{source} lacks tensor {name}; the configuration expects it as {dtype} {shape}")
        found = weights[name]
        if found.shape != parameter.shape or found.dtype != dtype:
            raise CheckpointError(
                f"{source}: tensor {name} is {found.dtype} {list(found.shape)}; the configuration expects "
                f"{dtype} {shape}. The weights belong to another configuration"
            )
    for name, found in weights.items():
        if name not in expected:
            raise CheckpointError(
                f"{source}: tensor {name} {list(found.shape)} is unknown to a {model.config.mixer!r} model "
                f"with num_layers={model.config.num_layers}. The weights belong to another configuration"
            )
