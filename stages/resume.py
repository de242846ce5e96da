"""What a training run needs to go on as if it had never stopped.

A resume checkpoint is three files: weights.safetensors, optimizer.safetensors (AdamW moments, random states) and
run.json (step, identity of the run, history and counters). The data order needs no state: it is computed from the
seed and the step.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import CheckpointError, check_weights
from model.transformer import Transformer
from stages.contract import Artifact, Refusal
from stages.optimizer import optimizer_tensors, restore_optimizer
from stages.pretrain_config import PretrainConfig

WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RUN_FILE = "run.json"


@dataclass
class RunState:
    """Where a run stands. step: optimizer steps done. history: the rows of tables/history."""

    step: int = 0
    loss: float | None = None  # of the last step whose loss was finite
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    spikes_skipped: int = 0
    recent_losses: list[float] = field(default_factory=list)  # what stages/skipped_steps.py judges a spike by
    recent_norms: list[float] = field(default_factory=list)
    train_seconds: float = 0.0
    history: list[dict[str, float | None]] = field(default_factory=list)


def run_identity(config: PretrainConfig, corpus: Artifact) -> dict[str, Any]:
    """All that decides the weights, flat by name: identity fields of the config, and which corpus it is."""
    identity = _config_identity(config)
    identity["corpus.fingerprint"] = corpus.facts["source"]["fingerprint"]
    identity["corpus.vocab_size"] = corpus.facts["vocab_size"]
    identity["corpus.train_tokens"] = corpus.facts["splits"]["train"]["tokens"]
    return identity


def _config_identity(config: PretrainConfig) -> dict[str, Any]:
    identity: dict[str, Any] = {}
    for name, description in type(config).model_fields.items():
        extra = description.json_schema_extra
        if isinstance(extra, dict) and extra.get("identity") is False:
            continue
        value = config.model_dump(mode="json")[name]
        if isinstance(value, dict):
            identity.update({f"{name}.{key}": entry for key, entry in value.items()})
        else:
            identity[name] = value
    return identity


def write_resume_checkpoint(
    directory: Path, model: Transformer, optimizer: torch.optim.AdamW, state: RunState, identity: Mapping[str, Any]
) -> None:
    """Write the three files. Nothing in today's loop draws random numbers; their states are kept for what may."""
    tensors = {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer, model).items()}
    tensors |= {f"rng.{name}": tensor for name, tensor in _random_states().items()}
    _save(directory / WEIGHTS_FILE, model.state_dict())
    _save(directory / OPTIMIZER_FILE, tensors)
    run = {"identity": dict(identity), "state": asdict(state)}
    (directory / RUN_FILE).write_text(json.dumps(run), encoding="utf-8")


def read_resume_checkpoint(
    directory: Path, model: Transformer, optimizer: torch.optim.AdamW, identity: Mapping[str, Any]
) -> RunState:
    """Load the three files into model, optimizer and the random generators.

    Refuses, naming the field, a checkpoint of another config or corpus; nothing is changed then. A field that the
    checkpoint does not know yet was at its default.
    """
    defaults = _config_identity(PretrainConfig())
    run = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
    for name in identity.keys() | run["identity"].keys():
        found = run["identity"].get(name, defaults.get(name, "(absent)"))
        expected = identity.get(name, "(absent)")
        if found != expected:
            raise Refusal(
                f"resume checkpoint {directory} was written with {name}={found}, this run has {name}={expected}; "
                f"set it back, or delete {directory.parent} to start over"
            )
    weights = load_file(directory / WEIGHTS_FILE)
    try:
        check_weights(model, weights, directory / WEIGHTS_FILE)
    except CheckpointError as error:
        raise Refusal(f"{error}; delete {directory.parent} to start over") from error
    model.load_state_dict(weights)
    tensors = load_file(directory / OPTIMIZER_FILE)
    restore_optimizer(optimizer, model, _below("optimizer.", tensors))
    _set_random_states(_below("rng.", tensors))
    return RunState(**run["state"])


def last_logged_step(metrics_file: Path) -> int:
    """Highest step in metrics.jsonl, 0 without one. A line torn by a crash is cut off first.

    A resumed run repeats the steps since its checkpoint and logs only what comes after this, so that every step is in
    the file once and a reader that follows it never sees it shrink by a whole line.
    """
    if not metrics_file.exists():
        return 0
    content = metrics_file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with metrics_file.open("r+b") as file:
            file.truncate(len(whole))
    return max((int(json.loads(line)["step"]) for line in whole.splitlines()), default=0)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
