"""What planning asks about a PretrainConfig: windows, disk space, costs. Imports no torch."""

from __future__ import annotations

from typing import Any

from lazypipe.model.config import ModelConfig, parameter_count
from lazypipe.model.costs import non_embedding_parameters, training_flops_per_token, training_memory
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.stage_row import CorpusSize, Vocabulary, Window


def model(config: PretrainConfig) -> ModelConfig:
    """The model it trains."""
    return config.model


def windows(config: PretrainConfig) -> list[Window]:
    """The windows it trains on and validates with."""
    return [Window("pretrain.seq_len", split, config.seq_len) for split in ("train", "validation")]


def resumes(config: PretrainConfig) -> bool:  # noqa: ARG001
    """Training goes on from its last checkpoint."""
    return True


def disk_bytes(config: PretrainConfig, corpus: CorpusSize) -> int:
    """float32 weights, plus weights and two moments for every kept resume checkpoint and the one being written."""
    return parameter_count(config.model, corpus.vocab_size) * 4 * (1 + 3 * (config.keep_checkpoints + 1))


def costs(config: PretrainConfig, vocabulary: Vocabulary | None, workers: int) -> dict[str, Any]:
    """Parameters, operations per token and memory; None for what depends on a vocabulary that nothing bounds.

    memory: bytes of one of `workers` data-parallel workers, by part and in total.
    """
    row: dict[str, Any] = {
        "mixer": config.model.mixer,
        "vocabulary": None if vocabulary is None else vocabulary._asdict(),
        "non_embedding_parameters": non_embedding_parameters(config.model),
        "parameters": None,
        "difference": None,
        "training_flops_per_token": None,
        "training_tokens": config.steps * config.tokens_per_step,
        "memory": None,
    }
    if vocabulary is not None:
        shape = (config.model, vocabulary.size, config.seq_len, config.micro_batch_size)
        memory = training_memory(
            *shape, config.dtype, workers, config.loss_chunk_tokens, config.activation_checkpointing
        )
        row |= {
            "parameters": parameter_count(config.model, vocabulary.size),
            "training_flops_per_token": training_flops_per_token(*shape),
            "memory": {**memory._asdict(), "total": memory.total},
        }
    return row
